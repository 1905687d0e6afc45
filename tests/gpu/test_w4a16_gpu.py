"""The W4A16 ops on a GPU: every kernel and tile against float64, and what serving needs of them."""

import pytest
import torch

from kernelgraft_core.quant.w4a16 import W4A16Weight, dequantize_w4a16, reference, w4a16_linear
from kernelgraft_core.quant.w4a16.triton_configs import DEQUANTIZE, architecture, candidates, list_selectable
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # weights and results are rounded to 11 and 8 bits
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16"])
LAYERS = [
    pytest.param(512, 1024, 128, id="g128"),
    pytest.param(384, 1024, 64, id="g64"),
    pytest.param(320, 1024, 32, id="g32"),
    pytest.param(256, 2048, 2048, id="one-group"),
    pytest.param(576, 1536, 64, id="smollm2-down"),
    pytest.param(192, 4128, 96, id="g96-K-tail"),
    pytest.param(37, 312, 24, id="odd-N-g24"),
    pytest.param(66, 136, 8, id="g8"),
    pytest.param(1, 8, 8, id="one-word"),
]


def arch():
    return architecture(torch.cuda.get_device_capability())


def weight(n, k, group, device):
    # Drawn on the CPU: the same numbers on every GPU.
    scales = (torch.rand(n, k // group) * 0.02 + 0.001).to(device)
    zeros = torch.randint(0, 16, (n, k // group)).to(device)
    return W4A16Weight.from_integers(torch.randint(0, 16, (n, k)).to(device), scales, zeros)


def parts(packed):
    return packed.qweight, packed.scales, packed.zeros


def exact(x, packed, bias=None):
    return reference.w4a16_linear(x.double(), *parts(packed), None if bias is None else bias.double())


@pytest.mark.parametrize(
    ("dtype", "n", "k", "group"),
    [pytest.param(torch.float16, *layer.values, id=f"fp16-{layer.id}") for layer in LAYERS]
    + [pytest.param(torch.bfloat16, *layer.values, id=f"bf16-{layer.id}") for layer in LAYERS[:3]],
)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 63, 64, 100, 129, 300])
def test_every_candidate_equals_the_product_with_the_dequantized_weight(m, n, k, group, dtype, device):
    from kernelgraft_core.quant.w4a16 import triton

    packed = weight(n, k, group, device)
    x, bias = torch.randn(m, k).to(device, dtype), torch.randn(n).to(device, dtype)
    wanted = exact(x, packed, bias)
    for config in {*candidates(arch(), m, n, k, group), DEQUANTIZE}:
        out = triton.run_w4a16_linear(config, x, *parts(packed), bias)
        assert_close(f"{config}", wanted, out, RATIO[dtype])
        assert torch.equal(out, triton.run_w4a16_linear(config, x, *parts(packed), bias)), config


@DTYPES
@pytest.mark.parametrize("m", [1, 5, 16, 33, 200])
def test_every_tile_runs_when_scales_have_another_layout(m, dtype, device):
    from kernelgraft_core.quant.w4a16 import triton

    packed, x = weight(96, 512, 64, device), torch.randn(m, 512).to(device, dtype)
    by_groups = (packed.qweight, packed.scales.contiguous(), packed.zeros.contiguous())
    for config in list_selectable(arch()):
        if config.kernel == "gemm" or config.block_m >= m:
            assert_close(
                f"{config}", exact(x, packed), triton.run_w4a16_linear(config, x, *by_groups, None), RATIO[dtype]
            )


@DTYPES
@pytest.mark.parametrize("m", [1, 12, 48, 256, 3000])
def test_the_public_op_on_a_layer_of_a_real_model(m, dtype, device):
    packed, x = weight(4096, 4096, 128, device), torch.randn(m, 4096).to(device, dtype)
    out = w4a16_linear(x, *parts(packed))
    assert out.dtype is dtype
    assert_close("out", exact(x, packed), out, RATIO[dtype])


def test_any_leading_shape_strides_and_no_tokens(device):
    packed = weight(64, 256, 64, device)
    x = torch.randn(256, 3, 2).to(device).half().permute(2, 1, 0)
    out = w4a16_linear(x, *parts(packed))
    assert out.shape == (2, 3, 64)
    assert out.is_contiguous()
    assert_close("out", exact(x, packed), out, 2e-3)
    assert w4a16_linear(x[:0], *parts(packed)).shape == (0, 3, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k", "group"), LAYERS)
def test_dequantizing_rounds_once(n, k, group, dtype, device):
    packed = weight(n, k, group, device)
    wanted = reference.dequantize_w4a16(*parts(packed), torch.float64).to(dtype)
    assert torch.equal(dequantize_w4a16(*parts(packed), dtype), wanted)


@DTYPES
def test_gradients_reach_the_input_and_the_bias(dtype, device):
    packed = weight(384, 512, 64, device)
    x = torch.randn(40, 512).to(device, dtype).requires_grad_()
    bias = torch.randn(384).to(device, dtype).requires_grad_()
    grad = torch.randn(40, 384).to(device, dtype)
    w4a16_linear(x, *parts(packed), bias).backward(grad)
    dense = reference.dequantize_w4a16(*parts(packed), torch.float64)
    assert_close("grad_x", grad.double() @ dense, x.grad, RATIO[dtype])
    assert_close("grad_bias", grad.double().sum(0), bias.grad, RATIO[dtype])


@pytest.mark.parametrize("scratch", [1 << 16, 64 << 20])
def test_the_dequantized_paths_work_in_blocks(scratch, monkeypatch, device):
    from kernelgraft_core.quant.w4a16 import triton

    monkeypatch.setattr(triton, "SCRATCH_BYTES", scratch)
    packed, x, bias = weight(1000, 512, 64, device), torch.randn(300, 512).to(device).half(), torch.randn(1000)
    bias = bias.to(device).half()
    out = triton.run_w4a16_linear(DEQUANTIZE, x, *parts(packed), bias)
    assert_close("out", exact(x, packed, bias), out, 2e-3)
    dense = reference.dequantize_w4a16(*parts(packed), torch.float64)
    assert_close("grad_x", out.double() @ dense, triton.w4a16_linear_dgrad(out, *parts(packed)), 2e-3)


@pytest.mark.parametrize("m", [1, 16, 64, 2048])
def test_a_captured_graph_replays_on_new_inputs(m, device):
    packed, bias = weight(1024, 1024, 128, device), torch.randn(1024).to(device).half()
    x = torch.randn(m, 1024).to(device).half()
    w4a16_linear(x, *parts(packed), bias)  # compiles: nothing may be loaded during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = w4a16_linear(x, *parts(packed), bias)
    for _ in range(2):
        x.copy_(torch.randn(m, 1024))
        out.fill_(torch.nan)
        graph.replay()
        assert_close("out", exact(x, packed, bias), out, 2e-3)


def test_compiles_without_a_graph_break(device):
    packed, x = weight(256, 512, 64, device), torch.randn(4, 512).to(device).half()
    compiled = torch.compile(lambda x: w4a16_linear(x, *parts(packed)), fullgraph=True)
    assert_close("out", exact(x, packed), compiled(x), 2e-3)


@pytest.mark.parametrize("m", [1, 64])
def test_a_nan_in_one_token_stays_there(m, device):
    packed, x = weight(256, 512, 64, device), torch.randn(m + 1, 512).to(device).half()
    x[m, 100] = torch.nan
    out = w4a16_linear(x, *parts(packed))
    assert out[m].isnan().all()
    assert out[:m].isfinite().all()


@pytest.mark.parametrize("m", [1, 64])
def test_large_activations_do_not_overflow_on_the_way(m, device):
    packed, x = weight(256, 1024, 128, device), torch.full((m, 1024), 200.0, dtype=torch.float16, device=device)
    packed = W4A16Weight(packed.qweight, packed.scales / 100, packed.zeros)
    assert_close("out", exact(x, packed), w4a16_linear(x, *parts(packed)), 3e-3)
