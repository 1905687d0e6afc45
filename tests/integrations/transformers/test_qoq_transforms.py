"""Every transform of QoQ on every architecture: without rounding the logits stay what they are."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from kernelgraft_core.quant import runner
from kernelgraft_core.quant.architectures import find_architecture
from kernelgraft_core.quant.architectures.attention import Attention
from kernelgraft_core.quant.qoq import QoqConfig, QoqMethod
from kernelgraft_core.quant.qoq.smoothing import smooth_attention
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.runner import quantize_model
from kernelgraft_core.runtime import testing
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .architecture_cases import CASES, deviation, logits, norms_in_float64, text_only, tiny

# What stands in the way of rotation; all other cases are rotated.
BEHIND = "is a norm behind a layer that writes the stream"
OBSTACLES = {
    "gemma2": BEHIND,
    "gemma3_text": BEHIND,
    "gemma3": BEHIND,
    "opt-norms-after": "has no norm with a weight in front of its layers",
    "opt-plain-norms": "has no norm with a weight in front of its layers",
}
ROTATED = [name for name in CASES if name not in OBSTACLES]
ALL = {"smooth_values": (0.5, 0.5)}
STEPS = {
    "rotate": True,
    "rotate_heads": True,
    "smooth_attention": 0.5,
    "smooth_output": (0.3, 0.7),
    "smooth_values": (0.5, 0.5),
    "reorder": True,
}
OFF = {
    "rotate": False,
    "rotate_heads": False,
    "smooth_attention": 0.0,
    "smooth_output": (0.0, 0.0),
    "smooth_values": (0.0, 0.0),
    "reorder": False,
}


def transform(model, inputs, **settings):
    config = QoqConfig(Scheme(4, -1), weight_bits=None, **settings)
    results = list(quantize_model(model, [inputs], QoqMethod(config), scheme_group_size=-1))
    assert [r.outcome.weights for r in results] == [{}] * 3
    return model


def transformed(name, **settings):
    """The model of a case, transformed, and how far its logits moved, all in float64."""
    with norms_in_float64():
        model, _ = tiny(CASES[name])
        before = logits(model, CASES[name])
        transform(model, CASES[name].inputs(model), **settings)
        return model, deviation(logits(model, CASES[name]), before)


def changed(model, name):
    """The parameters of a model that are not those of its case."""
    plain, architecture = tiny(CASES[name])
    for block in architecture.block_list(plain):
        architecture.prepare(block)
    original = dict(plain.named_parameters())
    return {n for n, p in model.named_parameters() if n in original and not torch.equal(p, original[n])}


@pytest.mark.parametrize("name", CASES)
def test_all_transforms_together_leave_the_logits_unchanged(name):
    model, found = transformed(name, rotate=name not in OBSTACLES, **ALL)
    assert found < 1e-9
    parts = {n.rpartition("layers.")[2].partition(".")[2] for n in changed(model, name)}
    assert any(part.endswith(("q_proj.weight", "q_norm.weight", "qkv_proj.weight", "query_key_value.weight"))
               for part in parts)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_in_float32_too(name):
    model = tiny(CASES[name])[0].float()
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in CASES[name].inputs(model.double()).items()}
    model.float()
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        transform(model, inputs, rotate=name not in OBSTACLES, **ALL)
        assert deviation(model(**inputs, use_cache=False).logits, before) < 1e-4


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_rotated_is_refused_by_name_before_anything_changes(name):
    model, _ = tiny(CASES[name])
    with pytest.raises(UnsupportedModelError, match=rf"cannot be rotated: .*{OBSTACLES[name]}.*rotate=False"):
        transform(model, CASES[name].inputs(model))
    assert not changed(model, name)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "phi3-grouped", "mixtral", "gemma", "opt", "gpt_neox-relu"])
@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone_changes_weights_and_not_logits(name, step):
    model, found = transformed(name, **OFF | {step: STEPS[step]})
    assert found < 1e-9
    assert changed(model, name)


def test_every_step_is_tried_alone():
    others = {"scheme", "zero", "weight_bits", "clip_steps", "refine_sweeps", "rounding", "damping"}
    others |= {"activation_bits", "cache_bits"}
    assert {field.name for field in fields(QoqConfig)} == STEPS.keys() | others


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_without_any_step_nothing_changes(name):
    assert not changed(transformed(name, **OFF)[0], name)


@pytest.mark.parametrize("name", ROTATED)
def test_norms_lose_their_weights_to_the_layers_that_read_them(name):
    model, _ = transformed(name, **OFF | {"rotate": True})
    architecture = find_architecture(model)
    for block in architecture.block_list(model):
        for group in architecture.scale_groups(block):
            source = group.source and block.get_submodule(group.source.module)
            if source is not None and source.weight.dim() == 1:
                assert (source.weight + group.source.offset == 1).all()
                assert not getattr(source, "bias", None) is not None or not source.bias.any()


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_a_tied_head_is_untied_by_rotation(name):
    with norms_in_float64():
        model, _ = tiny(CASES[name])
        model.lm_head.weight = model.get_input_embeddings().weight
        before = logits(model, CASES[name])
        transform(model, CASES[name].inputs(model))
        assert model.lm_head.weight is not model.get_input_embeddings().weight
        assert not model.config.tie_word_embeddings
        assert deviation(logits(model, CASES[name]), before) < 1e-9


def test_a_tied_head_stays_tied_without_rotation():
    model, _ = tiny(CASES["llama"])
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    transform(model, CASES["llama"].inputs(model), rotate=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def spoiled(name, **wrong):
    """How far the logits move when the adapter is ``wrong``."""
    with norms_in_float64(), pytest.MonkeyPatch.context() as patch:
        model, architecture = tiny(CASES[name])
        before = logits(model, CASES[name])
        patch.setattr(runner, "find_architecture", lambda _: replace(architecture, **wrong))
        transform(model, CASES[name].inputs(model))
        return deviation(logits(model, CASES[name]), before)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_routers_have_to_be_turned_too(name):
    original = find_architecture(tiny(CASES[name])[0]).groups

    def without_router(block):
        return tuple(
            replace(group, followers=tuple(f for f in group.followers if f != "mlp.gate")) for group in original(block)
        )

    assert spoiled(name, groups=without_router) > 1e-3


@pytest.mark.parametrize(
    ("name", "writers"),
    [
        ("opt", ()),
        ("llava_next", ("*multi_modal_projector.linear_2",)),
        ("qwen3_vl", ("*visual.merger.linear_fc2",)),
    ],
)
def test_whatever_writes_the_residual_stream_has_to_be_turned_too(name, writers):
    assert spoiled(name, writers=writers) > 1e-3


@pytest.mark.parametrize("name", [name for name in ROTATED if CASES[name].inputs is not text_only])
def test_pictures_that_nobody_turns_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"does not say which layers write pictures.*rotate=False"):
        spoiled(name, writers=())


@pytest.mark.parametrize("step", ["rotate_heads", "smooth_attention", "smooth_values"])
def test_a_family_whose_heads_are_not_known_is_refused_what_works_on_heads(monkeypatch, step):
    model, architecture = tiny(CASES["llama"])
    monkeypatch.setattr(runner, "find_architecture", lambda _: replace(architecture, attention=None))
    with pytest.raises(UnsupportedModelError, match=r"Llama adapter does not say where .*rotate_heads=False"):
        transform(model, CASES["llama"].inputs(model), **OFF | {step: STEPS[step]})
    assert not changed(model, "llama")
    transform(model, CASES["llama"].inputs(model), **OFF | {"rotate": True, "reorder": True})
    assert changed(model, "llama")


def like(name, **options):
    """A case with other options in its config."""

    def build():
        model = CASES[name].build()
        for option, value in options.items():
            setattr(model.config, option, value)
        return type(model)(model.config)

    return replace(CASES[name], build=build)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"hidden_size": 92, "head_dim": 16}, "no Hadamard matrix of order 92"),
        ("opt", {"word_embed_proj_dim": 16}, "its embeddings are 16 wide, its residual stream 32"),
        ("opt", {"enable_bias": False}, r"self_attn\.q_proj of block 0 has no bias to take over that of the norm"),
        ("opt", {"_remove_final_layer_norm": True}, r"model\.decoder has 0 norms behind its blocks"),
    ],
    ids=str,
)
def test_what_rotation_cannot_do_is_refused_by_name(name, options, message):
    case = like(name, **options)
    model, _ = tiny(case)
    with pytest.raises(UnsupportedModelError, match=rf"cannot be rotated: {message}.*rotate=False"):
        transform(model, case.inputs(model))


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_last_norm_whose_weight_is_zero_somewhere_keeps_its_bias_or_is_refused(bias):
    with norms_in_float64():
        model, _ = tiny(CASES["opt"])
        norm = model.model.decoder.final_layer_norm
        norm.weight.data[5], norm.bias.data[5] = 0, bias
        before = logits(model, CASES["opt"])
        if bias:
            with pytest.raises(UnsupportedModelError, match=r"final_layer_norm has a bias where its weight is 0"):
                transform(model, CASES["opt"].inputs(model))
        else:
            transform(model, CASES["opt"].inputs(model))
            assert deviation(logits(model, CASES["opt"]), before) < 1e-9


def test_norms_of_other_kinds_are_refused_by_name():
    model, _ = tiny(CASES["llama"])
    model.model.norm = nn.LayerNorm(32)
    with pytest.raises(UnsupportedModelError, match="it has LayerNorms and RMSNorms"):
        transform(model, CASES["llama"].inputs(model))
    model.model.norm = nn.BatchNorm1d(32)
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d is neither a LayerNorm nor an RMSNorm"):
        transform(model, CASES["llama"].inputs(model))


def test_heads_without_a_hadamard_matrix_are_refused_by_name():
    case = like("llama", head_dim=6)
    model, _ = tiny(case)
    with pytest.raises(UnsupportedModelError, match=r"no Hadamard matrix of order 6.*rotate_heads=False"):
        transform(model, case.inputs(model))
    with norms_in_float64():
        before = logits(model, case)
        transform(model, case.inputs(model), rotate_heads=False)
        assert deviation(logits(model, case), before) < 1e-9


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "qwen3", "opt"])
def test_keys_may_be_scaled_alike_only_where_rotary_embeddings_mix_them(name):
    """Random scales keep the logits exactly where there are no such embeddings."""
    with norms_in_float64():
        model, architecture = tiny(CASES[name])
        before = logits(model, CASES[name])
        for block in architecture.block_list(model):
            attention = architecture.attention(block)
            heads = 1 if attention.k_norm else attention.kv_heads
            scales = torch.rand(heads, attention.head_size, dtype=torch.float64, generator=testing.rng(1)) + 0.5
            smooth_attention(block, attention, scales.expand(attention.kv_heads, -1))
        found = deviation(logits(model, CASES[name]), before)
    assert (found < 1e-9) == (attention.rotary == 0)
    assert (found > 1e-3) == (attention.rotary > 0)


def test_interleaved_rotary_embeddings_are_refused_by_name(monkeypatch):
    model, architecture = tiny(CASES["llama"])

    def interleaved(block: nn.Module) -> Attention:
        assert architecture.attention is not None
        return replace(architecture.attention(block), interleaved=True)

    monkeypatch.setattr(runner, "find_architecture", lambda _: replace(architecture, attention=interleaved))
    with pytest.raises(UnsupportedModelError, match=r"interleaved rotary embeddings .*smooth_attention=0"):
        transform(model, CASES["llama"].inputs(model))
    assert not changed(model, "llama")
    transform(model, CASES["llama"].inputs(model), smooth_attention=0.0)
    assert changed(model, "llama")
