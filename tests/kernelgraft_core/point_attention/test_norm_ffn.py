"""Normalization, feed-forward network, normalization: every backend equals the definition, forward and gradients."""

import math

import pytest
import torch

from kernelgraft_core.point_attention import norm_ffn
from kernelgraft_core.point_attention.norm_ffn import examples
from kernelgraft_core.point_attention.norm_ffn.ops import NAMES, NORM_FFN
from kernelgraft_core.runtime.testing import assert_close, poison_empty

RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=["cpu", "torch", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def definition(x, update, n1, n1_bias, w1, b1, w2, b2, n2, n2_bias, eps=1e-5):
    """Written out, with erf."""

    def normalized(rows, weight, bias):
        centred = rows - rows.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * weight + bias

    hidden = normalized(x + update, n1, n1_bias)
    inner = hidden @ w1.T + b1
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return normalized(hidden + inner @ w2.T + b2, n2, n2_bias)


def operands(rows, channels, hidden, dtype=torch.float32, seed=0):
    generator, c, h = torch.Generator().manual_seed(seed), channels, hidden
    shapes = (rows, c), (rows, c), (c,), (c,), (h, c), (h,), (c, h), (c,), (c,), (c,)
    scales = 1, 1, 1, 1, 2 * c**-0.5, 1, h**-0.5, 1, 1, 1
    return [torch.randn(s, generator=generator).mul(f).to(dtype) for s, f in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("dtype", RATIO, ids=["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"), [(1, 16, 32), (200, 128, 256), (97, 40, 23), (5, 129, 65), (301, 6, 300)], ids=str
)
def test_is_its_definition(rows, channels, hidden, dtype, backend):
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("the reference's")
    leaves = [each.requires_grad_() for each in operands(rows, channels, hidden, dtype)]
    grad = torch.randn(rows, channels).to(dtype)
    with poison_empty():
        out = norm_ffn(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = definition(*exact)
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    assert out.dtype == dtype
    ratio = RATIO[dtype] * (2 if dtype == torch.bfloat16 else 1)
    for name, right, value in zip(("y", "x", "update", *NAMES), [wanted.detach(), *gradients], found, strict=True):
        assert_close(name, right, value, ratio)


@pytest.mark.parametrize("known", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize(("rows", "channels", "hidden"), [(100, 128, 256), (7, 21, 50)], ids=str)
def test_every_instruction_set(rows, channels, hidden, known, monkeypatch):
    pytest.importorskip("numba")
    from kernelgraft_core.point_attention.cpu_tile import TILE_SETS
    from kernelgraft_core.point_attention.norm_ffn import cpu
    from kernelgraft_core.runtime.cpu_vectors import is_there

    tiles = next(each for each in TILE_SETS if each.isa.name == known)
    if not is_there(tiles.isa):
        pytest.skip(f"{known} is not there")
    monkeypatch.setattr(cpu, "set_for", lambda dtype: tiles)
    tensors = operands(rows, channels, hidden)
    wanted = definition(*(each.double() for each in tensors))
    assert_close("y", wanted, cpu.norm_ffn(*tensors, 1e-5), 2e-6)


def test_gelu_is_exact(backend):
    """Through a network that is the identity but for GELU: over the whole range, to float32's rounding."""
    inner = torch.linspace(-12, 12, 2 * 4096).view(-1, 2)
    w1, b1 = torch.zeros(4096 * 2, 2), inner.flatten()
    w2, b2 = torch.zeros(2, 4096 * 2), torch.zeros(2)
    ones, zeros, worst = torch.ones(2), torch.zeros(2), 0.0
    for place in range(0, 4096 * 2, 128):
        w2.zero_()
        w2[0, place], w2[1, place] = 1, -1
        x = torch.tensor([[1.0, -1.0]])
        # normalized (g, -g) is g / sqrt(g^2 + eps): with a large eps that is nearly linear in g
        found = norm_ffn(x, zeros[None], zeros, zeros, w1, b1, w2, b2, ones, zeros, 1e4)[0, 0].double()
        value = found / (1 - found**2).sqrt() * 100
        right = b1[place].double() * torch.special.ndtr(b1[place].double())
        worst = max(worst, abs(float(value - right)) / max(1e-3, abs(float(b1[place]))))
    assert worst < 4e-7


def test_gradients_are_right():
    leaves = [each.double().requires_grad_() for each in operands(3, 4, 5)]
    assert torch.autograd.gradcheck(norm_ffn, leaves)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_are_no_numbers_stay_alone(value, dtype, backend):
    tensors = operands(20, 32, 48, dtype)
    wanted = norm_ffn(*tensors)
    tensors[0][7, 3] = value
    found = norm_ffn(*tensors)
    assert found[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(found[others], wanted[others])


def test_rows_of_any_layout(backend):
    tensors = operands(20, 32, 48)
    wide = torch.randn(20, 64)
    wide[:, 1::2] = tensors[0]
    turned = [wide[:, 1::2], *tensors[1:4], tensors[4].T.contiguous().T, *tensors[5:]]
    torch.testing.assert_close(norm_ffn(*turned), norm_ffn(*tensors))


def test_no_rows(backend):
    leaves = [each.requires_grad_() for each in operands(0, 32, 48)]
    out = norm_ffn(*leaves)
    assert out.shape == (0, 32)
    out.sum().backward()
    assert all(leaf.grad.eq(0).all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_and_company_do_not_change_the_result(dtype):
    pytest.importorskip("numba")
    tensors, before, found = operands(500, 128, 256, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(norm_ffn(*tensors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = norm_ffn(tensors[0][130:140], tensors[1][130:140], *tensors[2:])
    assert torch.equal(alone, found[0][130:140])


def test_it_is_a_sound_op():
    leaves = [each.requires_grad_() for each in operands(5, 8, 12)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(NORM_FFN._overload, (*leaves, 1e-5), test_utils=tests)


def test_autocast_converts_everything():
    leaves = [each.requires_grad_() for each in operands(30, 32, 48)]
    with torch.autocast("cpu", torch.bfloat16):
        out = norm_ffn(*leaves)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves)


def test_the_example_runs():
    (args,) = examples.example_args("cpu", dtype=torch.float32).values()
    assert NORM_FFN(*args).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4)}, r"x is torch\.float32 \(4,\)"),
        ({1: torch.zeros(4, 5)}, r"update is \(4, 5\), expected \(4, 6\)"),
        ({2: torch.zeros(5)}, r"norm1_weight is \(5,\), expected \(6,\)"),
        ({4: torch.zeros(6)}, r"fc1_bias is \(8,\), expected \(6,\)|fc1_weight is \(6,\), expected \(6, 6\)"),
        ({4: torch.zeros(0, 6)}, r"fc1_weight is \(0, 6\), expected \(H, 6\)"),
        ({6: torch.zeros(8, 6)}, r"fc2_weight is \(8, 6\), expected \(6, 8\)"),
        ({9: torch.zeros(6).double()}, r"norm2_bias is torch\.float64 on cpu, x torch\.float32"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = dict(enumerate(operands(4, 6, 8)))
    with pytest.raises(ValueError, match=message):
        norm_ffn(*(right | change).values())
