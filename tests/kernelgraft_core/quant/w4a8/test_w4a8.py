"""W4A8: the packed weight, and every backend bit for bit against exact integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from kernelgraft_core.quant.w4a8 import (
    W4A8Weight,
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
    w4a8_linear,
    w4a8_matmul,
)

from .w4a8_cases import FLOATS, weight_of

RELAXED = settings(deadline=None, max_examples=25)


@RELAXED
@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 6), st.sampled_from([2, 4, 6, -1]))
def test_integers_and_int8_come_back(seed, n, groups, group):
    k = groups * (2 if group == -1 else group)
    weight, wide = weight_of(n, k, group, seed)
    assert torch.equal(weight.int8().long(), wide)
    assert torch.equal(weight.qweight[:, 0] & 15, weight.integers()[:, 0])
    assert (weight.out_features, weight.in_features) == (n, k)
    assert weight.group_size == (k if group == -1 else group)
    torch.testing.assert_close(weight.values(torch.float64), wide * weight.scale.double().unsqueeze(-1))
    assert weight.fits_bytes


def test_the_low_nibble_is_the_even_column():
    weight = W4A8Weight.from_integers(torch.tensor([[1, 2, 15, 0]]), torch.ones(1), zero=torch.tensor([3]))
    assert weight.qweight.tolist() == [[0x21, 0x0F]]
    assert weight.int8().tolist() == [[-2, -1, 12, -3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.full((2, 4), 16)}, r"q spans 16..16, expected 0..15"),
        ({"q": torch.zeros(2, 3)}, r"q is \(2, 3\), expected \(N, K\) with an even K"),
        ({"scale": torch.tensor([1.0, torch.inf])}, "scale is not finite in 1 of 2 rows"),
        ({"scale": torch.ones(3)}, r"scale is \(3,\), expected \(2,\)"),
        ({"group_scale": torch.zeros(2, 2)}, "group_scale spans 0.0..0.0, expected 1..255"),
        ({"group_scale": torch.full((2, 2), 30)}, r"row 0 spans 210..210, which is no int8"),
        ({"group_zero": None}, "a weight has group_scale and group_zero, or zero, and not both"),
        ({"zero": torch.zeros(2)}, "and not both"),
        ({"group_scale": torch.ones(2, 3), "group_zero": torch.zeros(2, 3)}, "K = 4 does not split into 3 groups"),
    ],
)
def test_what_is_no_weight_is_refused(change, message):
    given_ = {
        "q": torch.full((2, 4), 7), "scale": torch.ones(2), "group_scale": torch.ones(2, 2),
        "group_zero": torch.zeros(2, 2),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        W4A8Weight.from_integers(given_.pop("q"), given_.pop("scale"), **given_)


def test_a_weight_that_leaves_a_byte_takes_the_slower_kernel():
    weight = W4A8Weight.from_integers(
        torch.full((1, 2), 15), torch.ones(1), group_scale=torch.full((1, 1), 17), group_zero=torch.full((1, 1), 200)
    )
    assert weight.int8().tolist() == [[55, 55]]
    assert not weight.fits_bytes


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_activations_are_quantized_token_by_token(dtype):
    x = torch.randn(3, 4, 20, dtype=torch.float64).to(dtype)
    x[0, 0] = 0
    q, scale, sums = quantize_activation(x.transpose(0, 1))
    x = x.transpose(0, 1)
    assert q.shape == x.shape
    assert scale.shape == sums.shape == x.shape[:-1]
    assert scale[0, 0] == 1
    assert not q[0, 0].any()
    assert q.abs().amax(-1).flatten()[1:].eq(127).all()
    assert torch.equal(sums, q.int().sum(-1))
    assert (
        (q.double() * scale.double().unsqueeze(-1) - x.double()).abs() <= scale.double().unsqueeze(-1) * 0.5001
    ).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_a_row_of_nan_and_no_other(value):
    weight, _ = weight_of(6, 16, 8)
    x = torch.randn(3, 16)
    x[1, 4] = value
    found = w4a8_linear(x, *weight.tensors)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_fused_quantization_is_that_of_the_product():
    x, weight = torch.randn(5, 24, dtype=torch.float64), torch.rand(24, dtype=torch.float64) + 0.5
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    for found, wanted in zip(rms_norm_quantize(x, weight, 1e-5), quantize_activation(normed), strict=True):
        assert torch.equal(found, wanted)
    gate, up = x.chunk(2, -1)
    product = torch.nn.functional.silu(gate) * up
    for found, wanted in zip(silu_mul_quantize(x), quantize_activation(product), strict=True):
        assert torch.equal(found, wanted)


def test_there_is_no_gradient():
    weight, _ = weight_of(4, 16, 8)
    with pytest.raises(NotImplementedError, match="w4a8_linear"):
        w4a8_linear(torch.randn(2, 16, requires_grad=True), *weight.tensors).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 15)}, r"x is \(2, 15\), expected \(..., 16\)"),
        ({"x": torch.ones(2, 16, dtype=torch.int32)}, "x is torch.int32"),
        ({"qweight": torch.zeros(4, 8, dtype=torch.int32)}, r"qweight is torch.int32"),
        ({"scale": torch.ones(4)}, r"scale is torch.float32 \(4,\), expected torch.float16"),
        ({"group_zero": None}, r"got \['group_scale'\], expected"),
        ({"group_scale": torch.ones(4, 3, dtype=torch.uint8)}, "K = 16 does not split into such groups"),
        ({"bias": torch.ones(5)}, r"bias is torch.float32 \(5,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused(change, message):
    weight, _ = weight_of(4, 16, 8)
    names = ("qweight", "scale", "group_scale", "group_zero", "zero")
    arguments = {"x": torch.randn(2, 16)} | dict(zip(names, weight.tensors, strict=True)) | {"bias": None} | change
    with pytest.raises(ValueError, match=message):
        w4a8_linear(**arguments)


@pytest.mark.parametrize("group", [8, -1])
def test_ops_pass_torchs_own_checks_and_compile_whole(group):
    weight, _ = weight_of(8, 32, group)
    x = torch.randn(3, 32)
    tests = ("test_schema", "test_faketensor")
    opcheck(torch.ops.kernelgraft.w4a8_linear.default, (x, *weight.tensors, None), test_utils=tests)
    quantized = quantize_activation(x)
    opcheck(
        torch.ops.kernelgraft.w4a8_matmul.default, (*quantized, *weight.tensors, None, torch.float16), test_utils=tests
    )
    opcheck(torch.ops.kernelgraft.quantize_activation.default, (x,), test_utils=tests)
    compiled = torch.compile(lambda t: w4a8_linear(t, *weight.tensors) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), w4a8_linear(x, *weight.tensors) * 2)
    assert torch.equal(w4a8_matmul(*quantized, *weight.tensors, None, torch.float32), w4a8_linear(x, *weight.tensors))
