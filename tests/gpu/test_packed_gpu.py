"""The ops of packed weights on a GPU: every kernel and tile against float64, and what serving needs of them."""

import pytest
import torch

from kernelgraft_core.quant.packed import reference
from kernelgraft_core.quant.packed.triton_configs import DEQUANTIZE, architecture, candidates, list_selectable
from kernelgraft_core.quant.w3a16 import dequantize_w3a16
from kernelgraft_core.quant.w4a16 import dequantize_w4a16
from kernelgraft_core.quant.weights import linear, pack_weight
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # weights and results are rounded to 11 and 8 bits
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16"])
BITS = pytest.mark.parametrize("bits", [3, 4])
DEQUANTIZED = {3: dequantize_w3a16, 4: dequantize_w4a16}
LAYERS = [
    pytest.param(bits, n, k, group, id=f"{bits}bits-{name}")
    for name, n, k, group, widths in (
        ("g128", 512, 1024, 128, (3, 4)),
        ("g64", 384, 1024, 64, (3, 4)),
        ("g32", 320, 1024, 32, (3, 4)),
        ("one-group", 256, 2048, 2048, (3, 4)),
        ("smollm2-down", 576, 1536, 64, (3, 4)),
        ("g96-K-tail", 192, 4128, 96, (3, 4)),
        ("odd-N-g96", 37, 480, 96, (3,)),
        ("odd-N-g24", 37, 312, 24, (4,)),
        ("g8", 66, 136, 8, (4,)),
        ("one-word", 1, 32, 32, (3,)),
        ("one-word", 1, 8, 8, (4,)),
    )
    for bits in widths
]


def arch():
    return architecture(torch.cuda.get_device_capability())


def random_weight(bits, n, k, group, device):
    # Drawn on the CPU: the same numbers on every GPU.
    scales = (torch.rand(n, k // group) * 0.02 + 0.001).to(device)
    zeros = torch.randint(0, 1 << bits, (n, k // group)).to(device)
    return pack_weight(torch.randint(0, 1 << bits, (n, k)).to(device), scales, zeros, bits)


def dense(weight):
    return reference.dequantize(weight.integers(), weight.scales, weight.zeros, torch.float64)


def exact(x, weight, bias=None):
    return reference.linear(x.double(), dense(weight), bias)


@pytest.mark.parametrize(
    ("dtype", "bits", "n", "k", "group"),
    [pytest.param(torch.float16, *layer.values, id=f"fp16-{layer.id}") for layer in LAYERS]
    + [pytest.param(torch.bfloat16, *layer.values, id=f"bf16-{layer.id}") for layer in LAYERS[:6]],
)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 63, 64, 100, 129, 300])
def test_every_candidate_equals_the_product_with_the_dequantized_weight(m, bits, n, k, group, dtype, device):
    from kernelgraft_core.quant.packed import triton

    weight = random_weight(bits, n, k, group, device)
    x, bias = torch.randn(m, k).to(device, dtype), torch.randn(n).to(device, dtype)
    wanted = exact(x, weight, bias)
    for config in {*candidates(arch(), bits, m, n, k, group), DEQUANTIZE}:
        out = triton.run_linear(config, x, weight, bias)
        assert_close(f"{config}", wanted, out, RATIO[dtype])
        assert torch.equal(out, triton.run_linear(config, x, weight, bias)), config


@BITS
@DTYPES
@pytest.mark.parametrize("m", [1, 5, 16, 33, 200])
def test_every_tile_runs_when_scales_have_another_layout(bits, m, dtype, device):
    from kernelgraft_core.quant.packed import triton

    weight, x = random_weight(bits, 96, 512, 64, device), torch.randn(m, 512).to(device, dtype)
    by_groups = type(weight)(*(t.contiguous() for t in weight.tensors))
    for config in list_selectable(arch()):
        if config.kernel == "gemm" or config.block_m >= m:
            assert_close(f"{config}", exact(x, weight), triton.run_linear(config, x, by_groups, None), RATIO[dtype])


@BITS
@DTYPES
@pytest.mark.parametrize("m", [1, 12, 48, 256, 3000])
def test_the_public_op_on_a_layer_of_a_real_model(bits, m, dtype, device):
    weight, x = random_weight(bits, 4096, 4096, 128, device), torch.randn(m, 4096).to(device, dtype)
    out = linear(x, weight)
    assert out.dtype is dtype
    assert_close("out", exact(x, weight), out, RATIO[dtype])


@BITS
def test_any_leading_shape_strides_and_no_tokens(bits, device):
    weight = random_weight(bits, 64, 256, 64, device)
    x = torch.randn(256, 3, 2).to(device).half().permute(2, 1, 0)
    out = linear(x, weight)
    assert out.shape == (2, 3, 64)
    assert out.is_contiguous()
    assert_close("out", exact(x, weight), out, 2e-3)
    assert linear(x[:0], weight).shape == (0, 3, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "n", "k", "group"), LAYERS)
def test_dequantizing_rounds_once(bits, n, k, group, dtype, device):
    weight = random_weight(bits, n, k, group, device)
    assert torch.equal(DEQUANTIZED[bits](*weight.tensors, dtype), dense(weight).to(dtype))


@BITS
@DTYPES
def test_gradients_reach_the_input_and_the_bias(bits, dtype, device):
    weight = random_weight(bits, 384, 512, 64, device)
    x = torch.randn(40, 512).to(device, dtype).requires_grad_()
    bias = torch.randn(384).to(device, dtype).requires_grad_()
    grad = torch.randn(40, 384).to(device, dtype)
    linear(x, weight, bias).backward(grad)
    assert_close("grad_x", grad.double() @ dense(weight), x.grad, RATIO[dtype])
    assert_close("grad_bias", grad.double().sum(0), bias.grad, RATIO[dtype])


@BITS
@pytest.mark.parametrize("scratch", [1 << 16, 64 << 20])
def test_the_dequantized_paths_work_in_blocks(bits, scratch, monkeypatch, device):
    from kernelgraft_core.quant.packed import triton

    monkeypatch.setattr(triton, "SCRATCH_BYTES", scratch)
    weight = random_weight(bits, 1000, 512, 64, device)
    x, bias = torch.randn(300, 512).to(device).half(), torch.randn(1000).to(device).half()
    out = triton.run_linear(DEQUANTIZE, x, weight, bias)
    assert_close("out", exact(x, weight, bias), out, 2e-3)
    assert_close("grad_x", out.double() @ dense(weight), triton.dgrad(out, weight), 2e-3)


@BITS
@pytest.mark.parametrize("m", [1, 16, 64, 2048])
def test_a_captured_graph_replays_on_new_inputs(bits, m, device):
    weight, bias = random_weight(bits, 1024, 1024, 128, device), torch.randn(1024).to(device).half()
    x = torch.randn(m, 1024).to(device).half()
    linear(x, weight, bias)  # compiles: nothing may be loaded during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, weight, bias)
    for _ in range(2):
        x.copy_(torch.randn(m, 1024))
        out.fill_(torch.nan)
        graph.replay()
        assert_close("out", exact(x, weight, bias), out, 2e-3)


@BITS
def test_compiles_without_a_graph_break(bits, device):
    weight, x = random_weight(bits, 256, 512, 64, device), torch.randn(4, 512).to(device).half()
    compiled = torch.compile(lambda x: linear(x, weight), fullgraph=True)
    assert_close("out", exact(x, weight), compiled(x), 2e-3)


@BITS
@pytest.mark.parametrize("m", [1, 64])
def test_a_nan_in_one_token_stays_there(bits, m, device):
    weight, x = random_weight(bits, 256, 512, 64, device), torch.randn(m + 1, 512).to(device).half()
    x[m, 100] = torch.nan
    out = linear(x, weight)
    assert out[m].isnan().all()
    assert out[:m].isfinite().all()


@BITS
@pytest.mark.parametrize("m", [1, 64])
def test_large_activations_do_not_overflow_on_the_way(bits, m, device):
    x = torch.full((m, 1024), 200.0, dtype=torch.float16, device=device)
    *planes, scales, zeros = (weight := random_weight(bits, 256, 1024, 128, device)).tensors
    weight = type(weight)(*planes, scales / 100, zeros)
    assert_close("out", exact(x, weight), linear(x, weight), 3e-3)
