"""W4A8 and W8A8 on a GPU: the kernels against the reference, and what serving needs of them."""

import pytest
import torch

from kernelgraft_core.quant.w4a8 import (
    W4A8Weight,
    quantize_activation,
    reference,
    rms_norm_quantize,
    silu_mul_quantize,
    w4a8_linear,
)
from kernelgraft_core.quant.w8a8 import reference as w8a8_reference
from kernelgraft_core.quant.w8a8 import w8a8_linear
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16", "fp32"])


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "triton")


def weight_of(n, k, group, device):
    q = torch.randint(0, 16, (n, k))
    scale = torch.rand(n) * 1e-2 + 1e-3
    if group == -1:
        return W4A8Weight.from_integers(q, scale, zero=torch.randint(0, 16, (n,))).to(device)
    step = torch.randint(1, 9, (n, k // group))
    zero = step * torch.randint(0, 15, step.shape)
    return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=zero).to(device)


@DTYPES
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1000, 768), (33, 128)])
@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 130, 1000])
def test_products_equal_the_reference(dtype, group, n, k, m, device):
    weight = weight_of(n, k, group, device)
    x, bias = torch.randn(m, k).to(device, dtype), torch.randn(n).to(device, dtype)
    found = w4a8_linear(x, *weight.tensors, bias)
    wanted = reference.w4a8_matmul(*quantize_activation(x), *weight.tensors, bias, torch.float64)
    assert_close("out", wanted, found, RATIO[dtype])
    assert torch.equal(found, w4a8_linear(x, *weight.tensors, bias))


@pytest.mark.parametrize("m", [1, 130])
def test_weights_that_leave_a_byte_are_exact(m, device):
    numbers = {"group_scale": torch.full((256, 8), 17), "group_zero": torch.full((256, 8), 200)}
    weight = W4A8Weight.from_integers(torch.randint(5, 16, (256, 512)), torch.rand(256) + 0.1, **numbers).to(device)
    assert not weight.fits_bytes
    x = torch.randn(m, 512, device=device)
    wanted = reference.w4a8_matmul(*quantize_activation(x), *weight.tensors, None, torch.float64)
    assert_close("out", wanted, w4a8_linear(x, *weight.tensors), RATIO[x.dtype])


@DTYPES
@pytest.mark.parametrize("m", [1, 16, 130])
def test_bytes_equal_the_reference(dtype, m, device):
    qweight, scale = (
        torch.randint(-128, 128, (1000, 768), dtype=torch.int8).to(device),
        torch.rand(1000).half().to(device),
    )
    x = torch.randn(m, 768).to(device, dtype)
    wanted = w8a8_reference.w8a8_matmul(*quantize_activation(x), qweight, scale, None, torch.float64)
    assert_close("out", wanted, w8a8_linear(x, qweight, scale), RATIO[dtype])


@DTYPES
@pytest.mark.parametrize("k", [64, 4096, 11008])
def test_quantizing_equals_the_reference(dtype, k, device):
    x = torch.randn(33, k).to(device, dtype)
    x[3], x[5, 1] = 0, torch.nan
    found, wanted = quantize_activation(x), reference.quantize_activation(x)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].nan_to_num(-1), wanted[1].nan_to_num(-1))
    assert torch.equal(found[2], wanted[2])
    finite = x[:3]
    weight, both = torch.rand(k).to(device, dtype), torch.cat((finite, finite), -1)
    for fused, plain in (
        (rms_norm_quantize(finite, weight, 1e-5), reference.rms_norm_quantize(finite, weight, 1e-5)),
        (silu_mul_quantize(both), reference.silu_mul_quantize(both)),
    ):
        assert (fused[0].int() - plain[0].int()).abs().max() <= 1
        torch.testing.assert_close(fused[1], plain[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("m", [1, 64])
def test_a_cuda_graph_replays_it(m, device):
    weight = weight_of(512, 1024, 128, device)
    x = torch.randn(m, 1024, device=device, dtype=torch.float16)
    w4a8_linear(x, *weight.tensors)  # compiles, repacks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = w4a8_linear(x, *weight.tensors)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, w4a8_linear(x, *weight.tensors))
