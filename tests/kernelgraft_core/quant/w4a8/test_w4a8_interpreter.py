"""The Triton kernels of W4A8 and W8A8 in the interpreter, on CPU tensors: integers are those of the reference."""

import os

import pytest
import torch

from kernelgraft_core.quant.w4a8 import W4A8Weight, reference
from kernelgraft_core.quant.w8a8 import reference as w8a8_reference
from kernelgraft_core.runtime.testing import poison_empty

from .w4a8_cases import weight_of

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.quant.w4a8 import triton
    from kernelgraft_core.quant.w8a8 import triton as w8a8_triton
else:
    triton = w8a8_triton = None

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def leaves_a_byte(n, k):
    """A weight whose products exceed a byte before the zero point is taken off."""
    numbers = {"group_scale": torch.full((n, k // 64), 17), "group_zero": torch.full((n, k // 64), 200)}
    weight = W4A8Weight.from_integers(torch.randint(5, 16, (n, k)), torch.rand(n) + 0.1, **numbers)
    assert not weight.fits_bytes
    return weight


@pytest.mark.parametrize(
    ("n", "k", "group"), [(64, 128, 64), (70, 128, 32), (33, 192, 64), (130, 256, 128), (9, 64, -1)]
)
@pytest.mark.parametrize("m", [1, 17])
@HALVES
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_products_are_those_of_the_reference(n, k, group, m, dtype, bias):
    weight, _ = weight_of(n, k, group)
    x, added = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if bias else None
    with poison_empty():
        found = triton.w4a8_linear(x, *weight.tensors, added)
    assert torch.equal(found, reference.w4a8_linear(x, *weight.tensors, added))


@pytest.mark.parametrize("m", [40, 70, 130])
def test_larger_tiles_of_tokens(m):
    weight, _ = weight_of(140, 128, 64)
    x = torch.randn(m, 128)
    assert torch.equal(triton.w4a8_linear(x, *weight.tensors, None), reference.w4a8_linear(x, *weight.tensors, None))


def test_a_weight_that_leaves_a_byte_takes_the_exact_kernel():
    weight = leaves_a_byte(40, 128)
    x = torch.randn(3, 128)
    assert torch.equal(triton.w4a8_linear(x, *weight.tensors, None), reference.w4a8_linear(x, *weight.tensors, None))


@pytest.mark.parametrize("group", [64, -1])
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_k_may_be_split(group, splits):
    weight, _ = weight_of(70, 576, group)
    x, bias = torch.randn(5, 576), torch.randn(70)
    prepared, quantized = triton.prepare(weight), triton.quantize_activation(x)
    found = triton.product(quantized, prepared, weight.scale, weight.zero, bias, x.dtype, splits)
    assert torch.equal(found, reference.w4a8_linear(x, *weight.tensors, bias))


@pytest.mark.parametrize(("n", "k", "m"), [(64, 128, 1), (33, 192, 20), (140, 64, 70)])
def test_bytes_are_multiplied_by_the_same_kernel(n, k, m):
    qweight, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n).half()
    x, bias = torch.randn(m, k), torch.randn(n)
    found = w8a8_triton.w8a8_linear(x, qweight, scale, bias)
    assert torch.equal(found, w8a8_reference.w8a8_linear(x, qweight, scale, bias))


@HALVES
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 3, 64), (2, 2100)])
def test_activations_are_those_of_the_reference(dtype, shape):
    x = torch.randn(shape).to(dtype)
    x.view(-1, shape[-1])[0] = 0
    with poison_empty():
        found = triton.quantize_activation(x)
    for each, wanted in zip(found, reference.quantize_activation(x), strict=True):
        assert torch.equal(each, wanted)


def test_halves_are_rounded_to_even():
    x = torch.cat((torch.arange(127) + 0.5, torch.tensor([127.0]))) * 3
    assert triton.quantize_activation(x.unsqueeze(0))[0][0, :4].tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("columns", [40, 2100])
def test_norm_and_activation_are_fused(columns):
    """The order of sums is another: integers may differ by one where a value lies between two."""
    x, weight = torch.randn(3, columns), torch.rand(columns) + 0.5
    both = torch.cat((x, torch.randn(3, columns)), -1)
    for found, wanted in (
        (triton.rms_norm_quantize(x, weight, 1e-5), reference.rms_norm_quantize(x, weight, 1e-5)),
        (triton.silu_mul_quantize(both), reference.silu_mul_quantize(both)),
    ):
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=0)
        off = (found[0].int() - wanted[0].int()).abs()
        assert off.max() <= 1
        assert off.float().mean() < 0.01
        assert torch.equal(found[2], found[0].sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_a_row_of_nan_and_no_other(value):
    weight, _ = weight_of(6, 64, 64)
    x = torch.randn(3, 64)
    x[1, 4] = value
    q, scale, _ = triton.quantize_activation(x)
    assert scale.isnan().tolist() == [False, True, False]
    assert not q[1].any()
    found = triton.w4a8_linear(x, *weight.tensors, None)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_strided_activations_and_empty_batches():
    weight, _ = weight_of(6, 64, 64)
    x = torch.randn(5, 3, 128)[:, 1, :64]
    assert torch.equal(triton.w4a8_linear(x, *weight.tensors, None), reference.w4a8_linear(x, *weight.tensors, None))
    assert triton.w4a8_linear(x[:0], *weight.tensors, None).shape == (0, 6)


def test_what_it_cannot_take_is_left_to_others():
    plain, x = weight_of(6, 64, 64)[0], torch.randn(2, 64)
    assert triton.supports_w4a8_linear(x, *plain.tensors, None) is None
    assert "float64" in triton.supports_w4a8_linear(x.double(), *plain.tensors, None)
    for weight, reason in (
        (weight_of(6, 96, 32)[0], "K = 96 is not a multiple of 64"),
        (weight_of(6, 192, 96)[0], "group size 96 is neither 32 nor a multiple of 64"),
        (plain.arranged(), "arranged for a CPU"),
    ):
        assert reason in triton.supports_w4a8_linear(torch.randn(2, weight.in_features), *weight.tensors, None)


def test_tuning_measures_every_candidate_and_keeps_the_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton, "measure_us", lambda run, device: run() or 1.0)
    weight, _ = weight_of(64, 512, 64)
    quantized = reference.quantize_activation(torch.randn(20, 512))
    wanted = reference.w4a8_matmul(*quantized, *weight.tensors, None, torch.float32)
    measured = []
    tune = triton.PLANS.tune

    def check(op, version, arch, shape, runs, measure):
        measured.extend(runs)
        return tune(op, version, arch, shape, runs, measure)

    monkeypatch.setattr(triton.PLANS, "tune", check)
    with triton.PLANS.tuning():
        found = triton.w4a8_matmul(*quantized, *weight.tensors, None, torch.float32)
    assert torch.equal(found, wanted)
    assert len(measured) > 2
    assert torch.equal(triton.w4a8_matmul(*quantized, *weight.tensors, None, torch.float32), wanted)
