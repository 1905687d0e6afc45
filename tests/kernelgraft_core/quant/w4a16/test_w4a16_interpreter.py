"""The W4A16 Triton kernels in Triton's interpreter, on CPU tensors: small shapes, every branch, against float64."""

import os

import pytest
import torch

from kernelgraft_core.quant.w4a16 import W4A16Weight, reference
from kernelgraft_core.runtime.testing import assert_close

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.quant.w4a16 import triton as w4a16
    from kernelgraft_core.quant.w4a16.triton_configs import DEQUANTIZE, Config

    SLICE_K = Config("slice_k", 8, 16, 64, 1, 4, 3)
    GEMM = Config("gemm", 32, 32, 32, 1, 4, 3)
    SPLIT = Config("gemm", 32, 32, 32, 3, 4, 3)
else:
    SLICE_K = GEMM = SPLIT = DEQUANTIZE = None

RATIO = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def weight(n, k, group, rows_innermost=True):
    """Random, with the strides of a GPU, or of a CPU where ``rows_innermost`` is false."""
    scales = torch.rand(n, k // group) * 0.02 + 0.001
    zeros = torch.randint(0, 16, (n, k // group))
    made = W4A16Weight.from_integers(torch.randint(0, 16, (n, k)), scales, zeros)
    if rows_innermost:
        return made.qweight, made.scales.T.contiguous().T, made.zeros.T.contiguous().T
    return made.qweight, made.scales, made.zeros


def exact(x, packed, bias=None):
    return reference.w4a16_linear(x.double(), *packed, None if bias is None else bias.double())


SHAPES = [
    pytest.param(1, 32, 256, 64, id="M1-g64"),
    pytest.param(1, 37, 8, 8, id="M1-odd-N-K8-one-word"),
    pytest.param(8, 20, 312, 24, id="M8-groups-of-three-words-K-tail"),
    pytest.param(3, 36, 256, 32, id="M3-two-groups-per-tile"),
    pytest.param(5, 44, 136, 136, id="M5-one-group-K-tail"),
    pytest.param(2, 18, 512, 128, id="M2-g128-N-not-a-multiple-of-4"),
]


@pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
@pytest.mark.parametrize("kernel", ["slice_k", "gemm", "split", "dequantize"])
def test_equals_the_product_with_the_dequantized_weight(kernel, m, n, k, group, dtype):
    config = {"slice_k": SLICE_K, "gemm": GEMM, "split": SPLIT, "dequantize": DEQUANTIZE}[kernel]
    packed, bias = weight(n, k, group), torch.randn(n).to(dtype)
    x = torch.randn(m, k).to(dtype)
    out = w4a16.run_w4a16_linear(config, x, *packed, bias)
    assert out.dtype is dtype
    assert_close("out", exact(x, packed, bias), out, RATIO[dtype])


@pytest.mark.parametrize("m", [31, 32, 33, 70])
def test_tiles_along_tokens_have_no_seam(m):
    packed, x = weight(40, 96, 32), torch.randn(m, 96).half()
    assert_close("out", exact(x, packed), w4a16.run_w4a16_linear(GEMM, x, *packed, None), 1e-3)


@pytest.mark.parametrize("kernel", ["slice_k", "gemm"])
def test_either_layout_of_the_scales_gives_the_same(kernel):
    config = SLICE_K if kernel == "slice_k" else GEMM
    rows = weight(32, 256, 64)
    groups = (rows[0], *(t.contiguous() for t in rows[1:]))
    assert w4a16._is_packed(*rows[1:])
    assert not w4a16._is_packed(*groups[1:])
    x = torch.randn(4, 256).half()
    by_rows, by_groups = (w4a16.run_w4a16_linear(config, x, *packed, None) for packed in (rows, groups))
    assert torch.equal(by_rows, by_groups)


@pytest.mark.parametrize("kernel", ["slice_k", "gemm", "split"])
def test_two_runs_are_bit_equal(kernel):
    config = {"slice_k": SLICE_K, "gemm": GEMM, "split": SPLIT}[kernel]
    packed, x = weight(32, 256, 64), torch.randn(4, 256).half()
    first, second = (w4a16.run_w4a16_linear(config, x, *packed, None) for _ in range(2))
    assert torch.equal(first, second)


def test_the_heuristic_runs_any_leading_shape_and_strides():
    packed, bias = weight(36, 64, 32), torch.randn(36).half()
    x = torch.randn(64, 3, 2).half().permute(2, 1, 0)
    out = w4a16.w4a16_linear(x, *packed, bias)
    assert out.shape == (2, 3, 36)
    assert out.is_contiguous()
    assert_close("out", exact(x, packed, bias), out, 1e-3)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens_give_no_output(shape):
    out = w4a16.w4a16_linear(torch.empty(shape, dtype=torch.float16), *weight(36, 64, 32), None)
    assert out.shape == (*shape[:-1], 36)


@pytest.mark.parametrize("kernel", ["slice_k", "gemm"])
def test_zero_scales_give_the_bias(kernel):
    qweight, scales, zeros = weight(32, 128, 32)
    bias, x = torch.randn(32).half(), torch.randn(4, 128).half()
    config = SLICE_K if kernel == "slice_k" else GEMM
    out = w4a16.run_w4a16_linear(config, x, qweight, torch.zeros_like(scales), zeros, bias)
    assert torch.equal(out, bias.expand(4, -1))


def test_a_nan_in_one_token_stays_there():
    packed, x = weight(32, 128, 32), torch.randn(4, 128).half()
    x[1, 5] = torch.nan
    out = w4a16.run_w4a16_linear(SLICE_K, x, *packed, None)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(37, 312, 24), (16, 8, 8), (20, 256, 128), (5, 272, 272)], ids=["g24", "K8", "g128", "row"]
)
def test_dequantizing_rounds_once(n, k, group, dtype):
    packed = weight(n, k, group)
    out = w4a16.dequantize_w4a16(*packed, dtype)
    assert torch.equal(out, reference.dequantize_w4a16(*packed, torch.float64).to(dtype))


@pytest.mark.parametrize("group", [16, 24, 256])
@pytest.mark.parametrize("scratch", [1, 64 << 20], ids=["blocks", "at-once"])
def test_the_gradient_and_the_dequantized_product_work_in_blocks(scratch, group, monkeypatch):
    monkeypatch.setattr(w4a16, "SCRATCH_BYTES", scratch)
    packed = weight(140, 768, group)
    x, grad, bias = torch.randn(3, 768).half(), torch.randn(3, 140).half(), torch.randn(140).half()
    assert_close("out", exact(x, packed, bias), w4a16.run_w4a16_linear(DEQUANTIZE, x, *packed, bias), 2e-3)
    wanted = grad.double() @ reference.dequantize_w4a16(*packed, torch.float64)
    assert_close("grad_x", wanted, w4a16.w4a16_linear_dgrad(grad, *packed), 2e-3)


def test_unsupported_types_are_named():
    packed, x = weight(8, 64, 32), torch.randn(2, 64)
    assert "torch.float32" in w4a16.supports_w4a16_linear(x, *packed, None)
    assert "torch.float64" in w4a16.supports_w4a16_linear_dgrad(torch.randn(2, 8).double(), *packed)
    assert "torch.float64" in w4a16.supports_dequantize_w4a16(*packed, torch.float64)
    assert w4a16.supports_dequantize_w4a16(*packed, torch.float32) is None
