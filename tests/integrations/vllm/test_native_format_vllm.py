"""kernelgraft's own format in vLLM: read from config.json, and sliced in both directions as the whole weight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear

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


def options(**chosen):
    config = KernelgraftAWQConfig.from_config(settings(**chosen))
    return {"bias": False, "params_dtype": torch.float32, "quant_config": config, "prefix": "layers.7.some_proj"}


def load(layer, stored, *shard):
    for name, tensor in stored.tensors.items():
        target = getattr(layer, name)
        target.weight_loader(target, tensor, *shard)


def product(layer, x):
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x).double()


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_column_parallel_ranks_hold_neighbouring_rows(be_rank, native_layer, bits, group_size, symmetric, ranks):
    stored = native_layer(K, N, bits, group_size, symmetric)
    x, outs = torch.randn(5, K), []
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.ColumnParallelLinear(K, N, **options(bits=bits, group_size=group_size, symmetric=symmetric))
        load(layer, stored)
        outs.append(product(layer, x))
    torch.testing.assert_close(torch.cat(outs, -1), x.double() @ stored.weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_row_parallel_ranks_add_up(be_rank, native_layer, bits, group_size, symmetric, ranks):
    stored = native_layer(K, N, bits, group_size, symmetric)
    x, total = torch.randn(5, K), 0.0
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.RowParallelLinear(K, N, **options(bits=bits, group_size=group_size, symmetric=symmetric))
        load(layer, stored)
        total = total + product(layer, x.chunk(ranks, -1)[rank])
    torch.testing.assert_close(total, x.double() @ stored.weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_merged_layers_are_loaded_one_by_one(be_rank, native_layer, bits, group_size, symmetric, ranks):
    widths, chosen = (64, 22), {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    parts = [native_layer(K, n, seed=seed, **chosen) for seed, n in enumerate(widths)]
    x = torch.randn(5, K)
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.MergedColumnParallelLinear(K, list(widths), **options(**chosen))
        for index, stored in enumerate(parts):
            load(layer, stored, index)
        mine = torch.cat([stored.weight.chunk(ranks)[rank] for stored in parts])
        torch.testing.assert_close(product(layer, x), x.double() @ mine.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 2), (2, 1)])
def test_attention_projections_are_split_by_heads(be_rank, native_layer, bits, group_size, symmetric, ranks, kv_heads):
    head, heads, chosen = 12, 4, {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    stored = {
        name: native_layer(K, n * head, seed=seed, **chosen)
        for seed, (name, n) in enumerate({"q": heads, "k": kv_heads, "v": kv_heads}.items())
    }
    x = torch.randn(5, K)
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.QKVParallelLinear(K, head, heads, kv_heads, **options(**chosen))
        for name in stored:
            load(layer, stored[name], name)
        mine = [stored["q"].weight.chunk(ranks)[rank]]
        mine += [stored[name].weight.chunk(min(ranks, kv_heads))[min(rank, kv_heads - 1)] for name in "kv"]
        torch.testing.assert_close(product(layer, x), x.double() @ torch.cat(mine).T, rtol=1e-3, atol=1e-3)


def test_misfits_are_refused_with_layer_and_value(be_rank, native_layer):
    layer = linear.ColumnParallelLinear(K, N, **options(bits=4))
    with pytest.raises(ValueError, match=r"7\.some_proj\.qweight .*\(48, 16\), expected torch.int32 with 32 columns"):
        load(layer, native_layer(K, N, 3, 64, False))
    be_rank(0, 4)
    with pytest.raises(ValueError, match=r"7\.some_proj: K = 48 on each of 4 tensor-parallel ranks .* multiple of 32"):
        linear.RowParallelLinear(192, N, **options(group_size=32))


@pytest.mark.parametrize(("key", "value"), [("bits", 5), ("group_size", 48), ("symmetric", 1), ("format_version", 2)])
def test_settings_that_do_not_run_are_refused_with_the_value(key, value):
    with pytest.raises(ValueError, match=f"{key} = {value}; kernelgraft_awq supports"):
        KernelgraftAWQConfig.from_config(settings(**{key: value}))
