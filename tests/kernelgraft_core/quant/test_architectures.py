"""Model families: which layers share activations, found by name and checked by type."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.architectures import (
    ARCHITECTURES,
    Architecture,
    ScaleGroup,
    Source,
    find_architecture,
    linear_layer,
    register_architecture,
)
from kernelgraft_core.runtime.errors import UnsupportedModelError

LLAMA = ARCHITECTURES[0]
LLAVA = next(a for a in ARCHITECTURES if a.name == "LLaVA")


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


def model_of_type(model_type, blocks=None, **config):
    model = nn.Module()
    model.config = SimpleNamespace(model_type=model_type, **config)
    if blocks is not None:
        model.model = nn.Module()
        model.model.layers = nn.ModuleList(blocks)
    return model


def only_mlp(block):
    return (ScaleGroup(None, ("up",), "up"),)


MINE = Architecture("Mine", ("mine", "mine_2"), ("decoder.blocks",), only_mlp)


@pytest.fixture
def mine():
    undo = register_architecture(MINE)
    yield undo
    undo()


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_family_is_found_by_model_type(model_type):
    assert find_architecture(model_of_type(model_type)) is LLAMA


def test_no_type_belongs_to_two_families():
    types = [model_type for architecture in ARCHITECTURES for model_type in architecture.model_types]
    assert len(types) == len(set(types))


def test_an_unknown_type_is_refused_with_the_known_ones_and_how_to_add_it():
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'; known: gemma, .*, llama, .*, qwen3_vl") as caught:
        find_architecture(model_of_type("gpt2"))
    assert "register an Architecture" in str(caught.value)
    assert "docs/quantization/architectures.md" in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="model type 'Linear'"):
        find_architecture(nn.Linear(1, 1))


def test_a_registered_family_is_found_until_it_is_taken_out(mine):
    assert find_architecture(model_of_type("mine_2")) is MINE
    with pytest.raises(UnsupportedModelError, match=r"known: .*mine, mine_2, .*opt"):
        find_architecture(model_of_type("yours"))
    mine()
    mine()  # twice is once
    with pytest.raises(UnsupportedModelError, match="model type 'mine'"):
        find_architecture(model_of_type("mine"))


def test_taking_out_removes_the_very_registration_and_no_later_one(mine):
    mine()
    undo = register_architecture(replace(MINE))  # equal, but another registration
    mine()
    assert find_architecture(model_of_type("mine")) == MINE
    undo()


@pytest.mark.parametrize("taken", ["llama", "mine"])
def test_a_type_that_is_taken_cannot_be_registered(mine, taken):
    with pytest.raises(ValueError, match=f"model type '{taken}' has an adapter already: (Llama|Mine)"):
        register_architecture(replace(MINE, name="Other", model_types=("new", taken)))
    with pytest.raises(UnsupportedModelError):
        find_architecture(model_of_type("new"))


@pytest.mark.parametrize("missing", ["model_types", "blocks"])
def test_an_adapter_without_types_or_paths_cannot_be_registered(missing):
    with pytest.raises(ValueError, match="'Mine' names no model types or no path"):
        register_architecture(replace(MINE, **{missing: ()}))


def test_a_registered_family_is_checked_like_ours(mine):
    model = model_of_type("mine")
    model.decoder, block = nn.Module(), nn.Module()
    block.up = nn.Linear(4, 4)
    model.decoder.blocks = nn.ModuleList([block])
    MINE.check(model)
    block.down = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match=r"decoder\.blocks\.0: the Mine adapter .* linear layers down"):
        MINE.check(model)


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
            assert read == {block.get_submodule(group.source.module).weight.shape[0]}
        block.get_submodule(group.inspect)


@pytest.mark.parametrize(("kv_heads", "source"), [(4, Source("self_attn.v_proj")), (2, None), (1, None)])
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


def test_the_check_names_block_and_layer():
    model = model_of_type("llama", [decoder_block(), decoder_block()])
    LLAMA.check(model)
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: mlp\.down_proj of Module is Identity"):
        LLAMA.check(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"model\.layers of Module is empty"):
        LLAMA.check(model_of_type("llama", []))
    with pytest.raises(UnsupportedModelError, match=r"Module has no list of decoder blocks: there is no model\.layers"):
        LLAMA.check(model_of_type("llama"))


def test_blocks_must_be_a_module_list():
    model = model_of_type("llama", [decoder_block()])
    assert (LLAMA.block_path(model), len(LLAMA.block_list(model))) == ("model.layers", 1)
    model.model.layers = nn.Linear(1, 1, device=torch.device("meta"))
    with pytest.raises(UnsupportedModelError, match=r"Module has no list of decoder blocks: model\.layers is Linear"):
        LLAMA.block_list(model)


@pytest.mark.parametrize("path", LLAVA.blocks)
def test_the_first_path_that_exists_counts(path):
    model = model_of_type("llava")
    parent = model
    for name in path.split(".")[:-1]:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.layers = nn.ModuleList([decoder_block()])
    assert LLAVA.block_path(model) == path
    assert LLAVA.block_list(model) is parent.layers


@pytest.mark.parametrize("text", [SimpleNamespace(model_type="gpt2"), None])
def test_a_tower_that_the_family_does_not_know_is_refused(text):
    model = model_of_type("llava", text_config=text)
    with pytest.raises(
        UnsupportedModelError, match=r"tower of this LLaVA model is of type (None|'gpt2'); known: llama"
    ):
        LLAVA.check(model)


def test_blocks_without_experts_need_no_preparation():
    block = decoder_block()
    before = dict(block.named_modules())
    LLAMA.prepare(block)
    with LLAMA.calibrating(block):
        assert dict(block.named_modules()) == before


def test_the_adapters_that_the_documentation_shows_work():
    page = Path(__file__).parents[3] / "docs" / "quantization" / "architectures.md"
    one_line, by_hand = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    shown = {}
    exec(one_line, shown)
    try:
        block = decoder_block()
        block.ffn_norm = block.post_attention_layernorm
        del block.post_attention_layernorm
        model = model_of_type("my_model", [block])
        find_architecture(model).check(model)
        sources = [group.source.module for group in find_architecture(model).scale_groups(block)]
        assert sources == ["input_layernorm", "self_attn.v_proj", "ffn_norm", "mlp.up_proj"]
    finally:
        shown["undo"]()
    exec(by_hand, shown)
    assert [group.source for group in shown["my_groups"](None)][:2] == [Source("norm1"), None]
