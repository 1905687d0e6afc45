"""KernelgraftAWQLinearMethod: every way vLLM fuses and shards a layer computes the product with the whole weight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear

from kernelgraft_vllm.awq import KernelgraftAWQConfig

K, TOKENS = 256, 5
# Far below what a column or group in the wrong place does; how exact the op is, its own tests say.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RANKS = [pytest.param(1, id="tp1"), pytest.param(2, id="tp2")]
GROUPS = [pytest.param(32, id="g32"), pytest.param(128, id="g128"), pytest.param(-1, id="one-group-per-column")]


def options(group: int, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    return {"params_dtype": dtype, "quant_config": KernelgraftAWQConfig(group), "prefix": "model.layers.7.some_proj"}


def load(layer, stored, *shard) -> None:
    for name in ("qweight", "qzeros", "scales"):
        target = getattr(layer, name)
        target.weight_loader(target, stored.tensors[name], *shard)


def product(layer, x, bias=None):
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x, bias)


def assert_product(out, x, weight, bias=0.0):
    expected = x.double() @ weight.T + bias
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[x.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("ranks", RANKS)
def test_column_parallel_ranks_hold_neighbouring_columns(be_rank, awq_layer, group, ranks):
    stored, x = awq_layer(K, 48, group), torch.randn(TOKENS, K)
    outs = []
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.ColumnParallelLinear(K, 48, bias=False, **options(group))
        load(layer, stored)
        outs.append(product(layer, x))
    assert_product(torch.cat(outs, -1), x, stored.weight)


@pytest.mark.parametrize("group", [*GROUPS, pytest.param(K, id="group-equal-to-K")])
@pytest.mark.parametrize("ranks", RANKS)
def test_row_parallel_ranks_add_up(be_rank, awq_layer, group, ranks):
    stored, x = awq_layer(K, 24, group), torch.randn(TOKENS, K)
    total = torch.zeros(TOKENS, 24)
    for rank, part in enumerate(x.chunk(ranks, -1)):
        be_rank(rank, ranks)
        layer = linear.RowParallelLinear(K, 24, bias=False, **options(group))
        load(layer, stored)
        total += product(layer, part)
    assert_product(total, x, stored.weight)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("ranks", RANKS)
def test_merged_columns_are_loaded_one_by_one(be_rank, awq_layer, group, ranks):
    widths = (64, 32)
    parts, x = [awq_layer(K, n, group, n) for n in widths], torch.randn(TOKENS, K)
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.MergedColumnParallelLinear(K, list(widths), bias=False, **options(group))
        for index, stored in enumerate(parts):
            load(layer, stored, index)
        mine = torch.cat([stored.weight.chunk(ranks)[rank] for stored in parts])
        assert_product(product(layer, x), x, mine)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("ranks", "kv_heads"),
    [pytest.param(1, 2, id="tp1"), pytest.param(2, 2, id="tp2"), pytest.param(2, 1, id="tp2-mqa")],
)
def test_attention_projections_are_split_by_heads_and_few_kv_heads_are_repeated(
    be_rank, awq_layer, group, ranks, kv_heads
):
    head, heads = 16, 4
    stored = {
        name: awq_layer(K, n * head, group, seed)
        for seed, (name, n) in enumerate({"q": heads, "k": kv_heads, "v": kv_heads}.items())
    }
    x = torch.randn(TOKENS, K)
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.QKVParallelLinear(K, head, heads, kv_heads, bias=False, **options(group))
        for name in stored:
            load(layer, stored[name], name)
        mine = [stored["q"].weight.chunk(ranks)[rank]]
        mine += [stored[name].weight.chunk(min(ranks, kv_heads))[min(rank, kv_heads - 1)] for name in "kv"]
        assert_product(product(layer, x), x, torch.cat(mine))


def test_projections_that_are_fused_on_disk_are_split_at_the_same_places(be_rank, awq_layer):
    head, heads, kv_heads = 16, 4, 2
    stored, x = awq_layer(K, (heads + 2 * kv_heads) * head, 64), torch.randn(TOKENS, K)
    be_rank(1, 2)
    layer = linear.QKVParallelLinear(K, head, heads, kv_heads, bias=False, **options(64))
    load(layer, stored)
    projections = stored.weight.split([heads * head, kv_heads * head, kv_heads * head])
    mine = torch.cat([projection.chunk(2)[1] for projection in projections])
    assert_product(product(layer, x), x, mine)


def test_a_replicated_layer_ignores_ranks(be_rank, awq_layer):
    stored, x = awq_layer(K, 24, 64), torch.randn(TOKENS, K)
    be_rank(1, 2)
    layer = linear.ReplicatedLinear(K, 24, bias=False, **options(64))
    load(layer, stored)
    assert_product(product(layer, x), x, stored.weight)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_activation_dtype_uses_float16_scales_as_stored(be_rank, awq_layer, dtype):
    stored = awq_layer(K, 32, 64)
    x, bias = torch.randn(2, 3, K).to(dtype), torch.randn(32).to(dtype)
    layer = linear.ColumnParallelLinear(K, 32, **options(64, dtype))
    load(layer, stored)
    out = product(layer, x, bias)
    assert out.dtype == dtype
    assert torch.equal(layer.scales, stored.tensors["scales"].T)
    assert_product(out, x, stored.weight, bias.double())


def test_after_loading_only_plain_parameters_in_the_kernels_layout_are_left(be_rank, awq_layer):
    layer = linear.ColumnParallelLinear(K, 32, bias=False, **options(64))
    load(layer, awq_layer(K, 32, 64))
    product(layer, torch.randn(1, K))
    found = {name: (type(p), p.dtype, tuple(p.shape)) for name, p in layer.named_parameters()}
    assert found == {
        "qweight": (torch.nn.Parameter, torch.int32, (32, K // 8)),
        "scales": (torch.nn.Parameter, torch.float16, (32, K // 64)),
        "zeros": (torch.nn.Parameter, torch.uint8, (32, K // 64)),
    }


def test_compiles_to_one_opaque_op_for_any_number_of_tokens(be_rank, assert_one_op, awq_layer):
    layer = linear.ColumnParallelLinear(K, 32, **options(64))
    load(layer, awq_layer(K, 32, 64))
    layer.bias.data.normal_()
    layer.quant_method.process_weights_after_loading(layer)
    assert_one_op(layer, K, torch.ops.kernelgraft.w4a16_linear.default)


def test_a_shard_that_cuts_a_group_is_refused_with_layer_and_sizes(be_rank):
    be_rank(0, 4)
    with pytest.raises(ValueError, match=r"7\.some_proj: K = 48 on each of 4 tensor-parallel ranks .* group of 32"):
        linear.RowParallelLinear(192, 64, bias=False, **options(32))
    be_rank(0, 1)
    with pytest.raises(ValueError, match=r"7\.some_proj: K = 100 is not a multiple of a group of 64"):
        linear.RowParallelLinear(100, 64, bias=False, **options(64))
    with pytest.raises(ValueError, match=r"7\.some_proj: K = 100 is not a multiple of 8 weights"):
        linear.RowParallelLinear(100, 64, bias=False, **options(-1))


def test_a_shard_that_cuts_a_word_is_refused_even_where_the_sum_would_fit(be_rank):
    be_rank(0, 2)
    with pytest.raises(ValueError, match=r"7\.some_proj: N = 12 on each of 2 tensor-parallel ranks .* 8 columns"):
        linear.MergedColumnParallelLinear(64, [24, 24], bias=False, **options(64))


def test_a_checkpoint_with_another_group_size_than_it_says_is_refused(be_rank, awq_layer):
    layer = linear.ColumnParallelLinear(K, 32, bias=False, **options(128))
    with pytest.raises(ValueError, match=r"7\.some_proj\.qzeros .*\(4, 4\), expected torch.int32 with 2 rows .* 128"):
        load(layer, awq_layer(K, 32, 64))


def test_a_gemv_checkpoint_under_a_gemm_label_is_refused(be_rank):
    layer = linear.ColumnParallelLinear(K, 32, bias=False, **options(64))
    gemv = torch.zeros(32, K // 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"7\.some_proj\.qweight .*\(32, 32\), expected torch.int32 with 256 rows"):
        layer.qweight.weight_loader(layer.qweight, gemv)


def test_floats_in_the_place_of_packed_integers_are_refused(be_rank):
    layer = linear.ColumnParallelLinear(K, 32, bias=False, **options(64))
    with pytest.raises(ValueError, match=r"qweight in the checkpoint is torch.float16"):
        layer.qweight.weight_loader(layer.qweight, torch.zeros(K, 4, dtype=torch.float16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused_by_layer(be_rank, awq_layer, value):
    stored = awq_layer(K, 32, 64)
    stored.tensors["scales"][1, 3] = value
    layer = linear.ColumnParallelLinear(K, 32, bias=False, **options(64))
    load(layer, stored)
    with pytest.raises(ValueError, match=r"7\.some_proj: scales in the checkpoint are not all finite"):
        layer.quant_method.process_weights_after_loading(layer)
