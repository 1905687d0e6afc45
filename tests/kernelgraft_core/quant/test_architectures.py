"""Model families: which layers share activations, found by name and checked by type."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.architectures import ARCHITECTURES, find_architecture, linear_layer
from kernelgraft_core.runtime.errors import UnsupportedModelError

LLAMA = ARCHITECTURES[0]


def decoder_block(heads=4, kv_heads=4, head_dim=8, inner=48):
    hidden = heads * head_dim
    attention, mlp, block = nn.Module(), nn.Module(), nn.Module()
    for name, width in (("q_proj", hidden), ("k_proj", kv_heads * head_dim), ("v_proj", kv_heads * head_dim)):
        attention.add_module(name, nn.Linear(hidden, width, bias=False))
    attention.add_module("o_proj", nn.Linear(hidden, hidden, bias=False))
    attention.head_dim = head_dim
    for name, (k, n) in {
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }.items():
        mlp.add_module(name, nn.Linear(k, n, bias=False))
    block.self_attn, block.mlp = attention, mlp
    block.input_layernorm, block.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
    return block


def model_of_type(model_type):
    model = nn.Module()
    model.config = SimpleNamespace(model_type=model_type)
    return model


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_family_is_found_by_model_type(model_type):
    assert find_architecture(model_of_type(model_type)) is LLAMA


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedModelError, match="model type 'gpt2'; known: llama, mistral"):
        find_architecture(model_of_type("gpt2"))
    with pytest.raises(UnsupportedModelError, match="model type 'Linear'"):
        find_architecture(nn.Linear(1, 1))


def test_every_linear_layer_is_the_target_of_exactly_one_group():
    block = decoder_block()
    targets = [name for group in LLAMA.scale_groups(block) for name in group.targets]
    assert sorted(targets) == sorted(name for name, m in block.named_modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_source_produces_the_channels_that_its_targets_read(kv_heads):
    block = decoder_block(kv_heads=kv_heads)
    for group in LLAMA.scale_groups(block):
        read = {linear_layer(block, name).in_features for name in group.targets}
        if group.source is not None:
            assert read == {block.get_submodule(group.source).weight.shape[0]}
        block.get_submodule(group.inspect)


@pytest.mark.parametrize(("kv_heads", "source"), [(4, "self_attn.v_proj"), (2, None), (1, None)])
def test_value_heads_that_several_query_heads_read_take_no_scales(kv_heads, source):
    groups = LLAMA.scale_groups(decoder_block(kv_heads=kv_heads))
    assert {g.targets: g.source for g in groups}["self_attn.o_proj",] == source


def test_only_attention_as_a_whole_needs_whole_sequences():
    mixes = [group.inspect for group in LLAMA.scale_groups(decoder_block()) if not group.per_token]
    assert mixes == ["self_attn"]


def test_a_missing_or_foreign_layer_is_refused_by_name():
    block = decoder_block()
    with pytest.raises(UnsupportedModelError, match=r"Module has no layer mlp\.fc1"):
        linear_layer(block, "mlp.fc1")
    block.mlp.up_proj = nn.Embedding(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj of Module is Embedding, expected Linear"):
        linear_layer(block, "mlp.up_proj")


def test_blocks_must_be_a_module_list():
    model = model_of_type("llama")
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([decoder_block()])
    assert len(LLAMA.block_list(model)) == 1
    model.model.layers = nn.Linear(1, 1, device=torch.device("meta"))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers of Module is Linear"):
        LLAMA.block_list(model)
