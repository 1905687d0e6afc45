"""Multi-scale deformable attention: every backend against the definition, forward and backward."""

import math

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, poison_empty, rng
from kernelgraft_core.vision.deform_attention import deform_attention
from kernelgraft_core.vision.deform_attention.examples import example_args
from kernelgraft_core.vision.deform_attention.ops import DEFORM_ATTENTION, DEFORM_ATTENTION_BACKWARD

from . import definitions

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def arguments(levels=((4, 3), (1, 1), (2, 5)), *, images=2, queries=5, heads=2, points=3, channels=5, spare=0):
    sizes = torch.tensor(levels).view(-1, 2)
    keys = sizes.prod(1)
    starts = keys.cumsum(0) - keys
    value = torch.randn(images, int(keys.sum()) + spare, heads, channels, generator=rng())
    shape = (images, queries, heads, len(levels), points)
    # Up to a third of the image outside; a tenth of a pixel away from where the derivative jumps.
    pixels = (torch.rand(*shape, 2, generator=rng(1)) * 1.6 - 0.3) * sizes.flip(1).view(1, 1, 1, -1, 1, 2) - 0.5
    pixels = pixels.floor() + 0.1 + 0.8 * (pixels - pixels.floor())
    locations = (pixels + 0.5) / sizes.flip(1).view(1, 1, 1, -1, 1, 2)
    weights = torch.rand(shape, generator=rng(2))
    return value, sizes, starts, locations, weights


def defined(args):
    value, sizes, starts, locations, weights = args
    leaves = [each.double().requires_grad_() for each in (value, locations, weights)]
    return definitions.deform_attention(leaves[0], sizes, starts, leaves[1], leaves[2]), leaves


@pytest.mark.parametrize("channels", [1, 5, 32])
def test_value_and_every_gradient(backend, channels):
    args = arguments(channels=channels)
    value, sizes, starts, locations, weights = args
    wanted, leaves = defined(args)
    ours = [each.clone().requires_grad_() for each in (value, locations, weights)]
    with poison_empty():
        found = deform_attention(ours[0], sizes, starts, ours[1], ours[2])
        assert_close("out", wanted, found, 2e-6)
        grad = torch.randn(wanted.shape, generator=rng(3))
        gradients = torch.autograd.grad(found, ours, grad)
    for name, right, mine in zip(
        ("value", "locations", "weights"), torch.autograd.grad(wanted, leaves, grad.double()), gradients, strict=True
    ):
        assert_close(f"grad_{name}", right, mine, 5e-6)


def test_float64_goes_to_the_reference_and_passes_gradcheck():
    value, sizes, starts, locations, weights = arguments(images=1, queries=2, points=2, channels=2)
    leaves = [each.double().requires_grad_() for each in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, p, w: deform_attention(v, sizes, starts, p, w), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(backend, dtype):
    value, sizes, starts, locations, weights = arguments(channels=16)
    args = [value.to(dtype), sizes, starts, locations.to(dtype), weights.to(dtype)]
    found = deform_attention(*args)
    assert found.dtype == dtype
    assert_close("out", defined(args)[0], found, 1e-3 if dtype == torch.float16 else 8e-3)
    gradients = DEFORM_ATTENTION_BACKWARD(found, *args)
    assert [each.dtype for each in gradients] == [dtype] * 3


@pytest.mark.parametrize(
    "sizes", [{"images": 0}, {"queries": 0}, {"points": 0}, {"levels": ()}, {"heads": 0}, {"channels": 0}]
)
def test_nothing_gives_zeros(backend, sizes):
    args = arguments(**sizes) if sizes != {"levels": ()} else arguments(((1, 1),))
    if sizes == {"levels": ()}:
        value, _, _, locations, weights = args
        args = (
            value,
            torch.zeros(0, 2, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int64),
            locations[:, :, :, :0],
            weights[:, :, :, :0],
        )
    with poison_empty():
        out = deform_attention(*args)
        assert not out.any()
        for each, like in zip(DEFORM_ATTENTION_BACKWARD(out, *args), (args[0], args[3], args[4]), strict=True):
            assert each.shape == like.shape
            assert not each.any()


def test_keys_of_no_level_have_no_gradient(backend):
    args = arguments(spare=3)
    with poison_empty():
        by_value, *_ = DEFORM_ATTENTION_BACKWARD(deform_attention(*args), *args)
    assert not by_value[:, -3:].any()


def test_far_outside_and_nan_count_nothing():
    pytest.importorskip("numba")
    value, sizes, starts, locations, weights = arguments()
    for far in (1e9, -1e30, math.inf, math.nan):
        args = value, sizes, starts, torch.full_like(locations, far), weights
        assert not deform_attention(*args).any()
        for each in DEFORM_ATTENTION_BACKWARD(torch.ones(2, 5, 10), *args):
            assert not each.any()


def test_a_nan_outside_of_the_sample_stays_there(backend):
    value = torch.full((1, 9, 1, 1), torch.nan)
    value[0, 0] = 2
    args = value, torch.tensor([[3, 3]]), torch.tensor([0]), torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    assert deform_attention(*args).item() == 0.5


def test_strided_arguments(backend):
    args = arguments()
    strided = [
        each.transpose(0, -1).contiguous().transpose(0, -1) if each.is_floating_point() else each for each in args
    ]
    assert_close("out", deform_attention(*args), deform_attention(*strided), 0)


def test_results_do_not_depend_on_the_number_of_threads(backend):
    args = arguments(queries=70, channels=16)
    grad = torch.randn(2, 70, 32, generator=rng(3))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((deform_attention(*args), *DEFORM_ATTENTION_BACKWARD(grad, *args)))
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(2, 23, 2)}, "value is"),
        ({1: torch.ones(3, 2)}, "sizes is"),
        ({2: torch.zeros(2, dtype=torch.int64)}, "starts is"),
        ({3: torch.zeros(2, 5, 2, 3, 3, 3)}, "locations is"),
        ({4: torch.zeros(2, 5, 2, 3, 2)}, "weights is"),
        ({4: torch.zeros(2, 5, 2, 3, 3, dtype=torch.double)}, "weights is torch.float64, value torch.float32"),
        ({1: torch.tensor([[4, 3], [1, 1], [2, 6]])}, "do not fit 23 keys"),
        ({2: torch.tensor([0, -1, 13])}, "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    args = [changed.get(i, each) for i, each in enumerate(arguments())]
    with pytest.raises(ValueError, match=message):
        deform_attention(*args)


def test_without_numba_the_reference_runs(monkeypatch):
    from kernelgraft_core.vision.deform_attention import cpu

    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    assert DEFORM_ATTENTION.explain("cpu", *arguments()) == {"cpu": "numba is not installed", "reference": "runs"}


@pytest.mark.parametrize("op", [DEFORM_ATTENTION, DEFORM_ATTENTION_BACKWARD])
def test_schema_fake_and_gradient_agree_with_the_op(op):
    (args,) = example_args("cpu", dtype=torch.float64).values()
    if op is DEFORM_ATTENTION:
        args = [each.requires_grad_() if each.is_floating_point() else each for each in args]
    else:
        args = [op_result(args), *args]
    torch.library.opcheck(getattr(torch.ops.kernelgraft, op.name).default, tuple(args))


def op_result(args):
    return torch.randn(deform_attention(*args).shape, dtype=args[0].dtype, generator=rng(3))


def test_compiled_code_gives_the_same():
    args = arguments(channels=8)
    compiled = torch.compile(deform_attention, fullgraph=True, backend="aot_eager")
    assert_close("out", deform_attention(*args), compiled(*args), 0)
