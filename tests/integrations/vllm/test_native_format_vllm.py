"""kernelgraft's own format in vLLM: read from config.json, and sliced in both directions as the whole weight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from kernelgraft_core.quant.weights import pack_weight
from kernelgraft_vllm.awq import KernelgraftAWQConfig

K, N = 256, 48
CASES = [(bits, group, symmetric) for bits in (3, 4) for group in (64, -1) for symmetric in (True, False)]


def settings(bits=4, group_size=64, symmetric=False, **more):
    return {
        "quant_method": "kernelgraft_awq",
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "modules_to_not_convert": None,
        "format_version": 1,
    } | more


@pytest.fixture
def be_rank(monkeypatch):
    def pretend(rank: int, size: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    return pretend


def options(**chosen):
    config = KernelgraftAWQConfig.from_config(settings(**chosen))
    return {"bias": False, "params_dtype": torch.float32, "quant_config": config, "prefix": "layers.7.some_proj"}


def stored_layer(bits, group_size, symmetric):
    group = K if group_size == -1 else group_size
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, K // group, generator=generator) / 50 + 0.001).half()
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    packed = pack_weight(q, scales, zeros, bits)
    names = ("qweight", "qhigh", "scales", "zeros") if bits == 3 else ("qweight", "scales", "zeros")
    tensors = {name: getattr(packed, name) for name in names if not (symmetric and name == "zeros")}
    spread = [part.double().repeat_interleave(group, 1) for part in (zeros, scales)]
    return tensors, (q.double() - spread[0]) * spread[1]


def product(layer, tensors, x):
    for name, tensor in tensors.items():
        target = getattr(layer, name)
        target.weight_loader(target, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x).double()


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_column_parallel_ranks_hold_neighbouring_rows(be_rank, bits, group_size, symmetric, ranks):
    tensors, weight = stored_layer(bits, group_size, symmetric)
    x, outs = torch.randn(5, K), []
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.ColumnParallelLinear(K, N, **options(bits=bits, group_size=group_size, symmetric=symmetric))
        outs.append(product(layer, tensors, x))
    torch.testing.assert_close(torch.cat(outs, -1), x.double() @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_row_parallel_ranks_add_up(be_rank, bits, group_size, symmetric, ranks):
    tensors, weight = stored_layer(bits, group_size, symmetric)
    x, total = torch.randn(5, K), 0.0
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.RowParallelLinear(K, N, **options(bits=bits, group_size=group_size, symmetric=symmetric))
        total = total + product(layer, tensors, x.chunk(ranks, -1)[rank])
    torch.testing.assert_close(total, x.double() @ weight.T, rtol=1e-3, atol=1e-3)


def test_misfits_are_refused_with_layer_and_value(be_rank):
    layer = linear.ColumnParallelLinear(K, N, **options(bits=4))
    with pytest.raises(ValueError, match=r"7\.some_proj\.qweight .*\(48, 16\), expected torch.int32 with 32 columns"):
        layer.qweight.weight_loader(layer.qweight, stored_layer(3, 64, False)[0]["qweight"])
    be_rank(0, 4)
    with pytest.raises(ValueError, match=r"7\.some_proj: K = 48 on each of 4 tensor-parallel ranks .* multiple of 32"):
        linear.RowParallelLinear(192, N, **options(group_size=32))


@pytest.mark.parametrize(("key", "value"), [("bits", 5), ("group_size", 48), ("symmetric", 1), ("format_version", 2)])
def test_settings_that_do_not_run_are_refused_with_the_value(key, value):
    with pytest.raises(ValueError, match=f"{key} = {value}; kernelgraft_awq supports"):
        KernelgraftAWQConfig.from_config(settings(**{key: value}))
