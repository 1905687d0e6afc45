"""KernelgraftQoQLinearMethod: every way vLLM fuses and shards a layer computes the product with the whole weight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear

from kernelgraft_core.quant.w4a8 import quantize_activation
from kernelgraft_vllm.qoq import KernelgraftQoQConfig

K, TOKENS = 256, 5
CASES = [pytest.param(g, zero, id=f"g{g}-{zero}") for g, zero in ((64, "pre"), (64, "post"), (K, "pre"), (-1, "pre"))]
RANKS = [pytest.param(1, id="tp1"), pytest.param(2, id="tp2")]


def settings(group=64, zero="pre", **more):
    return {
        "quant_method": "qoq",
        "bits": 4,
        "group_size": group,
        "zero": zero,
        "act_bits": 8,
        "kv": {"bits": 4, "smooth": True},
        "modules_to_not_convert": None,
        "format_version": 1,
    } | more


def options(group=64, zero="pre", dtype=torch.float32):
    config = KernelgraftQoQConfig.from_config(settings(group, zero))
    return {"bias": False, "params_dtype": dtype, "quant_config": config, "prefix": "layers.7.some_proj"}


def load(layer, stored, *shard):
    for name, tensor in stored.tensors.items():
        target = getattr(layer, name)
        target.weight_loader(target, tensor, *shard)


def product(layer, x, bias=None):
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x, bias)


def rounded(x):
    """What the layer multiplies with: each token as its 8-bit integers stand for it."""
    q, scale, _ = quantize_activation(x)
    return q.double() * scale.double().unsqueeze(-1)


def assert_product(out, x, weight, bias=0.0, tolerance=1e-5):
    expected = rounded(x) @ weight.T + bias
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("group", "zero"), CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_column_parallel_ranks_hold_neighbouring_rows(be_rank, qoq_layer, group, zero, ranks):
    stored, x = qoq_layer(K, 46, group, zero), torch.randn(TOKENS, K)
    outs = []
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.ColumnParallelLinear(K, 46, **options(group, zero))
        load(layer, stored)
        outs.append(product(layer, x))
    assert_product(torch.cat(outs, -1), x, stored.weight)


@pytest.mark.parametrize(("group", "zero"), CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_row_parallel_ranks_add_up(be_rank, qoq_layer, group, zero, ranks):
    """Each rank rounds its own part of a token."""
    stored, x = qoq_layer(K, 23, group, zero), torch.randn(TOKENS, K)
    total, expected = torch.zeros(TOKENS, 23), 0.0
    for rank, (part, weight) in enumerate(zip(x.chunk(ranks, -1), stored.weight.chunk(ranks, -1), strict=True)):
        be_rank(rank, ranks)
        layer = linear.RowParallelLinear(K, 23, **options(group, zero))
        load(layer, stored)
        total += product(layer, part)
        expected = expected + rounded(part) @ weight.T
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group", "zero"), CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_merged_rows_are_loaded_one_by_one(be_rank, qoq_layer, group, zero, ranks):
    widths = (64, 22)
    parts, x = [qoq_layer(K, n, group, zero, n) for n in widths], torch.randn(TOKENS, K)
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.MergedColumnParallelLinear(K, list(widths), **options(group, zero))
        for index, stored in enumerate(parts):
            load(layer, stored, index)
        mine = torch.cat([stored.weight.chunk(ranks)[rank] for stored in parts])
        assert_product(product(layer, x), x, mine)


@pytest.mark.parametrize(("group", "zero"), CASES)
@pytest.mark.parametrize(
    ("ranks", "kv_heads"),
    [pytest.param(1, 2, id="tp1"), pytest.param(2, 2, id="tp2"), pytest.param(2, 1, id="tp2-mqa")],
)
def test_attention_projections_are_split_by_heads_and_few_kv_heads_are_repeated(
    be_rank, qoq_layer, group, zero, ranks, kv_heads
):
    head, heads = 12, 4
    stored = {
        name: qoq_layer(K, n * head, group, zero, seed)
        for seed, (name, n) in enumerate({"q": heads, "k": kv_heads, "v": kv_heads}.items())
    }
    x = torch.randn(TOKENS, K)
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = linear.QKVParallelLinear(K, head, heads, kv_heads, **options(group, zero))
        for name in stored:
            load(layer, stored[name], name)
        mine = [stored["q"].weight.chunk(ranks)[rank]]
        mine += [stored[name].weight.chunk(min(ranks, kv_heads))[min(rank, kv_heads - 1)] for name in "kv"]
        assert_product(product(layer, x), x, torch.cat(mine))


@pytest.mark.parametrize("group", [64, -1])
def test_projections_that_are_fused_on_disk_are_split_at_the_same_places(be_rank, qoq_layer, group):
    head, heads, kv_heads = 16, 4, 2
    stored, x = qoq_layer(K, (heads + 2 * kv_heads) * head, group), torch.randn(TOKENS, K)
    be_rank(1, 2)
    layer = linear.QKVParallelLinear(K, head, heads, kv_heads, **options(group))
    load(layer, stored)
    projections = stored.weight.split([heads * head, kv_heads * head, kv_heads * head])
    assert_product(product(layer, x), x, torch.cat([projection.chunk(2)[1] for projection in projections]))


def test_a_replicated_layer_ignores_ranks(be_rank, qoq_layer):
    stored, x = qoq_layer(K, 24, 64), torch.randn(TOKENS, K)
    be_rank(1, 2)
    layer = linear.ReplicatedLinear(K, 24, **options())
    load(layer, stored)
    assert_product(product(layer, x), x, stored.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("group", [64, -1])
def test_every_activation_dtype_uses_float16_scales_as_stored(be_rank, qoq_layer, dtype, tolerance, group):
    stored = qoq_layer(K, 32, group)
    x, bias = torch.randn(2, 3, K).to(dtype), torch.randn(32).to(dtype)
    layer = linear.ColumnParallelLinear(K, 32, **options(group, dtype=dtype))
    load(layer, stored)
    out = product(layer, x, bias)
    assert out.dtype == dtype
    assert torch.equal(layer.scale, stored.tensors["scale"])
    assert_product(out, x, stored.weight, bias.double(), tolerance)


@pytest.mark.parametrize(("group", "zero"), [(64, "pre"), (64, "post"), (-1, "pre")])
def test_after_loading_only_plain_parameters_of_the_kernels_are_left(be_rank, qoq_layer, group, zero):
    layer, stored = linear.ColumnParallelLinear(K, 32, **options(group, zero)), qoq_layer(K, 32, group, zero)
    load(layer, stored)
    layer.quant_method.process_weights_after_loading(layer)
    weight = layer.quant_method.layout.read(stored.tensors).arranged()
    names = ("qweight", "scale", "group_scale", "group_zero", "zero")
    expected = {name: tensor for name, tensor in zip(names, weight.tensors, strict=True) if tensor is not None}
    found = dict(layer.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert type(parameter) is torch.nn.Parameter
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("group", [64, -1])
def test_compiles_to_one_opaque_op_for_any_number_of_tokens(be_rank, assert_one_op, qoq_layer, group):
    layer = linear.ColumnParallelLinear(K, 32, **options(group) | {"bias": True})
    load(layer, qoq_layer(K, 32, group))
    layer.bias.data.normal_()
    layer.quant_method.process_weights_after_loading(layer)
    assert_one_op(layer, K, torch.ops.kernelgraft.w4a8_linear.default)


def test_a_shard_that_cuts_a_group_is_refused_with_layer_and_sizes(be_rank):
    be_rank(0, 4)
    with pytest.raises(ValueError, match=r"7\.some_proj on each of 4 tensor-parallel ranks: K = 48 is no mul.* 32"):
        linear.RowParallelLinear(192, 64, **options(32))
    be_rank(0, 1)
    with pytest.raises(ValueError, match=r"7\.some_proj: K = 100 is no multiple of group size 64"):
        linear.RowParallelLinear(100, 64, **options(64))
    be_rank(0, 2)
    with pytest.raises(ValueError, match=r"ranks: K = 5 and groups of 5, which have to be even"):
        linear.RowParallelLinear(10, 64, **options(-1))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("group_scale", torch.ones(32, 2, dtype=torch.uint8), r"uint8 \(32, 2\), expected torch.uint8 with 4 columns"),
        ("qweight", torch.zeros(32, 32, dtype=torch.int32), r"int32 \(32, 32\), expected torch.uint8 with 128 columns"),
        ("scale", torch.ones(32, 1).half(), r"float16 \(32, 1\), expected torch.float16 of one dimension"),
        ("scale", torch.ones(32), r"float32 \(32,\), expected torch.float16"),
    ],
)
def test_tensors_of_another_kind_are_refused_by_name(be_rank, part, tensor, message):
    layer = linear.ColumnParallelLinear(K, 32, **options())
    with pytest.raises(ValueError, match=rf"7\.some_proj\.{part} in the checkpoint is torch\.{message}"):
        getattr(layer, part).weight_loader(getattr(layer, part), tensor)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scale", torch.nan, "scale is not finite everywhere"),
        ("scale", torch.inf, "scale is not finite everywhere"),
        ("group_scale", 0, "group_scale holds zeros"),
        ("group_zero", 16, "group_zero goes up to 16"),
    ],
)
def test_numbers_that_are_no_weight_are_refused_by_layer(be_rank, qoq_layer, part, value, message):
    stored = qoq_layer(K, 32, 64)
    stored.tensors[part][3] = value
    layer = linear.ColumnParallelLinear(K, 32, **options())
    load(layer, stored)
    with pytest.raises(ValueError, match=rf"7\.some_proj: {message}"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("missing", ["qweight", "scale", "group_scale", "group_zero"])
def test_a_tensor_that_the_checkpoint_lacks_is_refused(be_rank, qoq_layer, missing):
    layer = linear.MergedColumnParallelLinear(K, [64, 32], **options())
    first, second = qoq_layer(K, 64, 64), qoq_layer(K, 32, 64, seed=1)
    load(layer, first, 0)
    del second.tensors[missing]
    load(layer, second, 1)
    with pytest.raises(ValueError, match=rf"7\.some_proj: .*1 x {missing}"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("group", [64, -1])
def test_dummy_weights_run(be_rank, group):
    """vLLM's ``--load-format dummy`` fills what is floating point, and nothing else."""
    layer = linear.ColumnParallelLinear(K, 32, **options(group))
    for parameter in layer.parameters():
        parameter.data.fill_(1e-3 if parameter.is_floating_point() else 255)
    assert product(layer, torch.randn(2, K)).isfinite().all()
