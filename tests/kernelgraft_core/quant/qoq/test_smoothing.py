"""SmoothAttention, output smoothing and reordering: the numbers of the paper, and what they do to a block."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.architectures import Source
from kernelgraft_core.quant.architectures.attention import Attention, Rows, fused_attention, separate_attention
from kernelgraft_core.quant.qoq.reorder import channel_order, head_order, reorder_heads, reorder_inner
from kernelgraft_core.quant.qoq.smoothing import (
    attention_scales,
    output_scales,
    smooth_attention,
    smooth_output,
    smooth_values,
    value_scales,
)
from kernelgraft_core.runtime import testing

HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 8, 24


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=testing.rng(seed))


def linear(inputs, outputs, seed):
    layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    layer.weight.data, layer.bias.data = normal(outputs, inputs, seed=seed), normal(outputs, seed=seed + 100)
    return layer.requires_grad_(False)


def attention_block(fused=False, **config):
    block, attention = nn.Module(), nn.Module()
    widths = {"q_proj": HEADS * SIZE, "k_proj": KV_HEADS * SIZE, "v_proj": KV_HEADS * SIZE}
    if fused:
        attention.qkv_proj = linear(WIDTH, sum(widths.values()), 1)
    for seed, (name, width) in enumerate(widths.items()):
        if not fused:
            attention.add_module(name, linear(WIDTH, width, seed))
    attention.o_proj = linear(HEADS * SIZE, WIDTH, 5)
    attention.head_dim, attention.config = SIZE, SimpleNamespace(**config)
    block.self_attn = attention
    return block


def heads_of(block):
    return fused_attention(block) if hasattr(block.self_attn, "qkv_proj") else separate_attention(block)


def parts(block, x):
    """Queries, keys and values ``(T, heads, size)``."""
    attention = heads_of(block)
    return [
        block.get_submodule(rows.module)(x)[:, rows.index(x.device)].view(len(x), -1, SIZE)
        for rows in (attention.q, attention.k, attention.v)
    ]


def outputs(block, x):
    """What the attention output makes of the values as they are, each read by the query heads that share it."""
    values = parts(block, x)[2].repeat_interleave(HEADS // KV_HEADS, 1)
    return block.self_attn.o_proj(values.flatten(1))


def attention(rotary=SIZE, **options):
    spans = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    rows = {name: Rows(f"{name}_proj", ((0, count * SIZE),)) for name, count in spans.items()}
    return Attention(**rows, output="o_proj", head_size=SIZE, rotary=rotary, **options)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_channels_that_rotary_embeddings_mix_share_the_larger_magnitude(alpha):
    largest = normal(KV_HEADS * SIZE).abs()
    scales = attention_scales(attention(), largest, alpha)
    assert scales.shape == (KV_HEADS, SIZE)
    for head in range(KV_HEADS):
        own = largest[head * SIZE : (head + 1) * SIZE]
        pairs = [max(float(own[i]), float(own[i + SIZE // 2])) ** alpha for i in range(SIZE // 2)]
        wanted = torch.tensor(pairs * 2, dtype=torch.float64)
        torch.testing.assert_close(scales[head] / scales[head, 0], wanted / wanted[0])
        assert float(scales[head].log().sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rotary", [0, 4])
def test_channels_that_are_not_mixed_have_scales_of_their_own(rotary):
    largest = normal(KV_HEADS * SIZE).abs()
    scales = attention_scales(attention(rotary), largest, 1.0)
    by_head = largest.view(KV_HEADS, SIZE)
    own = scales[:, rotary:] / by_head[:, rotary:]
    torch.testing.assert_close(own, own[:, :1].expand_as(own))
    assert torch.equal(scales[:, : rotary // 2], scales[:, rotary // 2 : rotary])


def test_heads_behind_a_norm_share_their_scales():
    largest = normal(KV_HEADS * SIZE).abs()
    scales = attention_scales(attention(q_norm="q_norm", k_norm="k_norm"), largest, 0.5)
    assert torch.equal(scales[0], scales[1])


def test_dead_channels_leave_scales_finite():
    for scales in (
        attention_scales(attention(), torch.zeros(KV_HEADS * SIZE), 0.5),
        output_scales(torch.zeros(6), torch.zeros(3, 6), (0.3, 0.7)),
    ):
        torch.testing.assert_close(scales, torch.ones_like(scales))


@pytest.mark.parametrize("fused", [False, True])
def test_scores_stay_and_keys_get_even(fused):
    block, x = attention_block(fused), normal(30, WIDTH)
    found = heads_of(block)
    layer = block.get_submodule(found.k.module)
    layer.weight[found.k.index(x.device)[3]] *= 50  # one channel of the first head
    q, k, v = parts(block, x)
    scales = attention_scales(found, k.abs().amax(0).flatten(), 1.0)
    smooth_attention(block, found, scales)
    new_q, new_k, new_v = parts(block, x)
    torch.testing.assert_close(new_k, k / scales)
    shared = HEADS // KV_HEADS
    for before, after in (((q, k), (new_q, new_k)),):
        scores = [torch.einsum("thd,shd->hts", a, b.repeat_interleave(shared, 1)) for a, b in (before, after)]
        torch.testing.assert_close(*scores)
    assert torch.equal(v, new_v)
    unevenness = [k[:, 0].abs().amax(0).max() / k[:, 0].abs().amax(0).median() for k in (k, new_k)]
    assert unevenness[1] < unevenness[0] / 5


@pytest.mark.parametrize("fused", [False, True])
def test_smoothed_values_leave_the_output_as_it_is(fused):
    block, x = attention_block(fused), normal(30, WIDTH)
    found, before = heads_of(block), outputs(block, x)
    scales = value_scales(found, normal(HEADS * SIZE).abs(), block.self_attn.o_proj.weight, (0.4, 0.6))
    smooth_values(block, found, scales)
    torch.testing.assert_close(outputs(block, x), before)


def test_scales_of_values_are_those_of_the_largest_head_that_shares_them():
    found, weight, largest = attention(), normal(WIDTH, HEADS * SIZE), normal(HEADS * SIZE).abs()
    scales = value_scales(found, largest, weight, (0.3, 0.7)).flatten()
    shared = HEADS // KV_HEADS
    x = largest.view(KV_HEADS, shared, SIZE).amax(1).flatten()
    w = weight.abs().amax(0).view(KV_HEADS, shared, SIZE).amax(1).flatten()
    wanted = x**0.3 / w**0.7
    torch.testing.assert_close(scales / scales[0], wanted / wanted[0])


def mlp(fused=False):
    block = nn.Module()
    if fused:
        block.gate_up = linear(WIDTH, 32, 1)
        producers = (Source("gate_up", rows=((0, 16),)), Source("gate_up", rows=((16, 32),)))
    else:
        block.gate, block.up = linear(WIDTH, 16, 1), linear(WIDTH, 16, 2)
        producers = (Source("gate"), Source("up"))
    block.down = linear(16, WIDTH, 3)
    return block, producers


def inner(block, x):
    gate, up = block.gate_up(x).chunk(2, -1) if hasattr(block, "gate_up") else (block.gate(x), block.up(x))
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("fused", [False, True])
def test_smoothed_outputs_are_divided_and_the_layer_behind_makes_up_for_it(fused):
    block, producers = mlp(fused)
    x = normal(20, WIDTH)
    before, seen = block.down(inner(block, x)), inner(block, x)
    largest = seen.abs().amax(0)
    scales = output_scales(largest, block.down.weight, (0.3, 0.7))
    wanted = largest**0.3 / block.down.weight.abs().amax(0) ** 0.7
    torch.testing.assert_close(scales / scales[0], wanted / wanted[0])
    smooth_output(block, producers[1], "down", scales)
    torch.testing.assert_close(inner(block, x), seen / scales)
    torch.testing.assert_close(block.down(inner(block, x)), before)


@pytest.mark.parametrize("fused", [False, True])
def test_reordered_inner_channels_come_by_descending_magnitude(fused):
    block, producers = mlp(fused)
    x = normal(20, WIDTH)
    before, largest = block.down(inner(block, x)), inner(block, x).abs().amax(0)
    reorder_inner(block, producers, "down", channel_order(largest))
    torch.testing.assert_close(block.down(inner(block, x)), before)
    found = inner(block, x).abs().amax(0)
    assert (found[:-1] >= found[1:]).all()
    torch.testing.assert_close(found, largest.sort(descending=True).values)


@pytest.mark.parametrize("fused", [False, True])
def test_reordered_heads_stay_whole_and_alike_where_they_share_values(fused):
    block, x = attention_block(fused), normal(30, WIDTH)
    found, before, values = heads_of(block), outputs(block, x), parts(block, x)[2]
    largest = values.repeat_interleave(HEADS // KV_HEADS, 1).abs().amax(0).flatten()
    order = head_order(found, largest)
    assert torch.equal(order.sort(-1).values, torch.arange(SIZE).expand(KV_HEADS, -1))
    reorder_heads(block, found, order)
    torch.testing.assert_close(outputs(block, x), before)
    magnitudes = parts(block, x)[2].abs().amax(0)
    assert (magnitudes[:, :-1] >= magnitudes[:, 1:]).all()
    torch.testing.assert_close(magnitudes, values.abs().amax(0).sort(-1, descending=True).values)


def test_equal_magnitudes_keep_their_order():
    assert channel_order(torch.tensor([1.0, 3.0, 1.0, 3.0])).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("config", "turned"),
    [
        ({}, SIZE),
        ({"partial_rotary_factor": 0.5}, 4),
        ({"rotary_pct": 0.25}, 2),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 4),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}}, SIZE),
    ],
    ids=str,
)
def test_the_share_of_a_head_that_is_turned_comes_from_the_config(config, turned):
    assert separate_attention(attention_block(**config)).rotary == turned
