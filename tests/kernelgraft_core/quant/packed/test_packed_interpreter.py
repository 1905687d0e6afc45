"""The Triton kernels for packed weights in Triton's interpreter, on CPU tensors: small shapes, every branch."""

import importlib
import os

import pytest
import torch

from kernelgraft_core.quant.packed import reference
from kernelgraft_core.quant.weights import pack_weight
from kernelgraft_core.runtime.testing import assert_close

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.quant.packed import triton
    from kernelgraft_core.quant.packed.triton_configs import DEQUANTIZE, Config

    SLICE_K = Config("slice_k", 8, 16, 64, 1, 4, 3)
    GEMM = Config("gemm", 32, 32, 32, 1, 4, 3)
    SPLIT = Config("gemm", 32, 32, 32, 3, 4, 3)
else:
    SLICE_K = GEMM = SPLIT = DEQUANTIZE = None

RATIO = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


BITS = pytest.mark.parametrize("bits", [3, 4])


def random_weight(bits, n, k, group, rows_innermost=True):
    """With the strides of a GPU, or of a CPU where ``rows_innermost`` is false."""
    scales = torch.rand(n, k // group) * 0.02 + 0.001
    zeros = torch.randint(0, 1 << bits, (n, k // group))
    made = pack_weight(torch.randint(0, 1 << bits, (n, k)), scales, zeros, bits)
    if not rows_innermost:
        return made
    *planes, scales, zeros = made.tensors
    return type(made)(*planes, scales.T.contiguous().T, zeros.T.contiguous().T)


def dense(weight, dtype=torch.float64):
    return reference.dequantize(weight.integers(), weight.scales, weight.zeros, torch.float64).to(dtype)


def exact(x, weight, bias=None):
    return reference.linear(x.double(), dense(weight), bias)


SHAPES = [
    pytest.param(4, 1, 32, 256, 64, id="4bits-M1-g64"),
    pytest.param(4, 1, 37, 8, 8, id="4bits-M1-odd-N-K8-one-word"),
    pytest.param(4, 8, 20, 312, 24, id="4bits-M8-groups-of-three-words-K-tail"),
    pytest.param(4, 3, 36, 256, 32, id="4bits-M3-two-groups-per-tile"),
    pytest.param(4, 5, 44, 136, 136, id="4bits-M5-one-group-K-tail"),
    pytest.param(4, 2, 18, 512, 128, id="4bits-M2-g128-N-not-a-multiple-of-4"),
    pytest.param(3, 1, 32, 256, 64, id="3bits-M1-g64"),
    pytest.param(3, 1, 37, 32, 32, id="3bits-M1-odd-N-K32-one-word"),
    pytest.param(3, 8, 20, 480, 96, id="3bits-M8-groups-of-three-words-K-tail"),
    pytest.param(3, 3, 36, 256, 32, id="3bits-M3-two-groups-per-tile"),
    pytest.param(3, 5, 44, 160, 160, id="3bits-M5-one-group-K-tail"),
    pytest.param(3, 2, 18, 512, 128, id="3bits-M2-g128-N-not-a-multiple-of-4"),
]


@pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "m", "n", "k", "group"), SHAPES)
@pytest.mark.parametrize("kernel", ["slice_k", "gemm", "split", "dequantize"])
def test_equals_the_product_with_the_dequantized_weight(kernel, bits, m, n, k, group, dtype):
    config = {"slice_k": SLICE_K, "gemm": GEMM, "split": SPLIT, "dequantize": DEQUANTIZE}[kernel]
    weight, bias = random_weight(bits, n, k, group), torch.randn(n).to(dtype)
    x = torch.randn(m, k).to(dtype)
    out = triton.run_linear(config, x, weight, bias)
    assert out.dtype is dtype
    assert_close("out", exact(x, weight, bias), out, RATIO[dtype])


@BITS
@pytest.mark.parametrize("m", [31, 32, 33, 70])
def test_tiles_along_tokens_have_no_seam(bits, m):
    weight, x = random_weight(bits, 40, 96, 32), torch.randn(m, 96).half()
    assert_close("out", exact(x, weight), triton.run_linear(GEMM, x, weight, None), 1e-3)


@BITS
@pytest.mark.parametrize("kernel", ["slice_k", "gemm"])
def test_either_layout_of_the_scales_gives_the_same(kernel, bits):
    config = SLICE_K if kernel == "slice_k" else GEMM
    rows = random_weight(bits, 32, 256, 64)
    groups = type(rows)(*(t.contiguous() for t in rows.tensors))
    assert triton._is_packed(rows)
    assert not triton._is_packed(groups)
    x = torch.randn(4, 256).half()
    by_rows, by_groups = (triton.run_linear(config, x, weight, None) for weight in (rows, groups))
    assert torch.equal(by_rows, by_groups)


@BITS
@pytest.mark.parametrize("kernel", ["slice_k", "gemm", "split"])
def test_two_runs_are_bit_equal(kernel, bits):
    config = {"slice_k": SLICE_K, "gemm": GEMM, "split": SPLIT}[kernel]
    weight, x = random_weight(bits, 32, 256, 64), torch.randn(4, 256).half()
    first, second = (triton.run_linear(config, x, weight, None) for _ in range(2))
    assert torch.equal(first, second)


@BITS
@pytest.mark.parametrize("kernel", ["slice_k", "gemm"])
def test_every_integer_and_zero_point_takes_part(kernel, bits):
    largest = (1 << bits) - 1
    zeros = torch.arange(largest + 1).unsqueeze(1)
    q = torch.arange(64).expand(largest + 1, 64) * 5 % (largest + 1)
    weight = pack_weight(q, torch.ones(largest + 1, 1), zeros, bits)
    x = torch.eye(64).half()
    config = SLICE_K if kernel == "slice_k" else GEMM
    for first in range(0, 64, 8):
        out = triton.run_linear(config, x[first : first + 8], weight, None)
        assert torch.equal(out, (q - zeros).T[first : first + 8].half())


@BITS
def test_the_heuristic_runs_any_leading_shape_and_strides(bits):
    weight, bias = random_weight(bits, 36, 64, 32), torch.randn(36).half()
    x = torch.randn(64, 3, 2).half().permute(2, 1, 0)
    out = triton.linear(x, weight, bias)
    assert out.shape == (2, 3, 36)
    assert out.is_contiguous()
    assert_close("out", exact(x, weight, bias), out, 1e-3)


@BITS
def test_planes_of_other_strides_are_taken(bits):
    weight, x = random_weight(bits, 36, 64, 32), torch.randn(2, 64).half()
    strided = type(weight)(*(t.T.contiguous().T for t in weight.tensors))
    assert torch.equal(triton.linear(x, strided, None), triton.linear(x, weight, None))
    assert torch.equal(triton.dequantize(strided, torch.float32), dense(weight, torch.float32))


@BITS
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens_give_no_output(bits, shape):
    out = triton.linear(torch.empty(shape, dtype=torch.float16), random_weight(bits, 36, 64, 32), None)
    assert out.shape == (*shape[:-1], 36)


@BITS
@pytest.mark.parametrize("kernel", ["slice_k", "gemm"])
def test_zero_scales_give_the_bias(kernel, bits):
    *planes, scales, zeros = (weight := random_weight(bits, 32, 128, 32)).tensors
    bias, x = torch.randn(32).half(), torch.randn(4, 128).half()
    config = SLICE_K if kernel == "slice_k" else GEMM
    out = triton.run_linear(config, x, type(weight)(*planes, torch.zeros_like(scales), zeros), bias)
    assert torch.equal(out, bias.expand(4, -1))


@BITS
def test_a_nan_in_one_token_stays_there(bits):
    weight, x = random_weight(bits, 32, 128, 32), torch.randn(4, 128).half()
    x[1, 5] = torch.nan
    out = triton.run_linear(SLICE_K, x, weight, None)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "n", "k", "group"),
    [
        (4, 37, 312, 24), (4, 16, 8, 8), (4, 20, 256, 128), (4, 5, 272, 272),
        (3, 37, 288, 96), (3, 16, 32, 32), (3, 20, 256, 128), (3, 5, 544, 544),
    ],
)  # fmt: skip
def test_dequantizing_rounds_once(bits, n, k, group, dtype):
    weight = random_weight(bits, n, k, group)
    assert torch.equal(triton.dequantize(weight, dtype), dense(weight, dtype))


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 24), (4, 256), (3, 32), (3, 96), (3, 256)])
@pytest.mark.parametrize("scratch", [1, 64 << 20], ids=["blocks", "at-once"])
def test_the_gradient_and_the_dequantized_product_work_in_blocks(scratch, bits, group, monkeypatch):
    monkeypatch.setattr(triton, "SCRATCH_BYTES", scratch)
    weight = random_weight(bits, 140, 768, group)
    x, grad, bias = torch.randn(3, 768).half(), torch.randn(3, 140).half(), torch.randn(140).half()
    assert_close("out", exact(x, weight, bias), triton.run_linear(DEQUANTIZE, x, weight, bias), 2e-3)
    assert_close("grad_x", grad.double() @ dense(weight), triton.dgrad(grad, weight), 2e-3)


@BITS
def test_the_backend_of_each_family_runs_them_and_names_unsupported_types(bits):
    backend = importlib.import_module(f"kernelgraft_core.quant.w{bits}a16.triton")
    name = f"w{bits}a16"
    run, supports = {}, {}
    for op in (f"{name}_linear", f"{name}_linear_dgrad", f"dequantize_{name}"):
        run[op], supports[op] = getattr(backend, op), getattr(backend, f"supports_{op}")
    weight = random_weight(bits, 8, 64, 32)
    tensors, x, grad = weight.tensors, torch.randn(2, 64), torch.randn(2, 8)
    bias = torch.randn(8)
    out = run[f"{name}_linear"](x.half(), *tensors, bias.half())
    assert_close("out", exact(x.half(), weight, bias.half()), out, 1e-3)
    assert_close("grad", grad.double() @ dense(weight), run[f"{name}_linear_dgrad"](grad.half(), *tensors), 2e-3)
    dequantize = f"dequantize_{name}"
    assert torch.equal(run[dequantize](*tensors, torch.float32), dense(weight, torch.float32))
    assert "torch.float32" in supports[f"{name}_linear"](x, *tensors, None)
    assert "torch.float64" in supports[f"{name}_linear_dgrad"](grad.double(), *tensors)
    assert "torch.float64" in supports[dequantize](*tensors, torch.float64)
    assert supports[dequantize](*tensors, torch.float32) is None
    assert supports[f"{name}_linear"](x.half(), *tensors, None) is None
