"""``quantize_checkpoint`` with the QoQ recipes: what is stored around the blocks, and that it is the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kernelgraft_core.quant.architectures import find_architecture
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.qoq import QoqMethod, as_served, qoq_config
from kernelgraft_core.quant.qoq.turn import Turn
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.runner import as_arguments, quantize_model
from kernelgraft_core.runtime.errors import UnsupportedModelError
from kernelgraft_transformers.convert import convert_checkpoint
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration, encode

CALIBRATION = Calibration(samples=4, length=48, seed=1)
RECIPES = {"qoq-g64": 64, "qoq-chn": -1}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
GATED = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.125}
FAMILIES = {
    "gemma": (GemmaForCausalLM, GATED),  # tied
    "opt": (OPTForCausalLM, {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.125}),  # tied, LayerNorm
    "gpt_neox": (GPTNeoXForCausalLM, {**SMALL, "intermediate_size": 128, "initializer_range": 0.125}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
}
CONFIGS = {
    GemmaForCausalLM: GemmaConfig, OPTForCausalLM: OPTConfig, GPTNeoXForCausalLM: GPTNeoXConfig,
    Qwen3MoeForCausalLM: Qwen3MoeConfig, Gemma2ForCausalLM: Gemma2Config,
}  # fmt: skip


def save(kind, options, float_llama, directory):
    """A random model with norms and biases that are not the identity, and the tokenizer of ``float_llama``."""
    torch.manual_seed(0)
    model = kind(CONFIGS[kind](**options))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.half().save_pretrained(directory)
    AutoTokenizer.from_pretrained(float_llama).save_pretrained(directory)
    return directory


def quantize(source, out, words, recipe="qoq-g64", **options):
    return quantize_checkpoint(
        load_source(str(source)), out, words, recipe=recipe, calibration=CALIBRATION, **options
    )  # fmt: skip


def stored_tensors(directory):
    """All tensors of a checkpoint as they are computed with, under the names that they have there."""
    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    layout = find_layout(json.loads((directory / "config.json").read_text())["quantization_config"])
    for layer in sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        parts = {name.removeprefix(f"{layer}."): stored.pop(name) for name in list(stored) if name.startswith(layer)}
        bias = parts.pop("bias", None)
        stored[f"{layer}.weight"] = layout.read(parts).values(torch.float32)
        if bias is not None:
            stored[f"{layer}.bias"] = bias
    return {name: tensor.float() for name, tensor in stored.items()}


def stored_model(directory, scratch):
    """A float32 model of the numbers that a checkpoint stores, loaded as Transformers loads any."""
    from safetensors.torch import save_file

    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    config.save_pretrained(scratch)
    save_file(stored_tensors(directory), scratch / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, words, source):
    tokens = encode(AutoTokenizer.from_pretrained(source), words)[:48].unsqueeze(0)
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_config_says_what_is_stored(float_llama, words, tmp_path, recipe):
    record = quantize(float_llama, tmp_path / "out", words, recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "qoq",
        "bits": 4,
        "group_size": RECIPES[recipe],
        "zero": "post",
        "act_bits": 8,
        "kv": {"bits": 4, "smooth": True},
        "modules_to_not_convert": None,
        "format_version": 1,
    }
    assert record["recipe"] == recipe
    assert record["settings"]["rotate"]
    assert len(record["layers"]) == 14
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any(name.endswith(("k_scale", "v_scale")) for name in names)
    parts = {"qweight", "scale"} | ({"zero"} if recipe == "qoq-chn" else {"group_scale", "group_zero"})
    assert {name.rpartition(".")[2] for name in names if ".q_proj." in name} == parts


@pytest.mark.parametrize(
    ("settings", "zero", "kv"),
    [
        ({"zero": "pre"}, "pre", {"bits": 4, "smooth": True}),
        ({"smooth_attention": 0.0}, "post", {"bits": 4, "smooth": False}),
        ({"cache_bits": None}, "post", None),
    ],
    ids=str,
)
def test_settings_reach_the_config(float_llama, words, tmp_path, settings, zero, kv):
    quantize(float_llama, tmp_path / "out", words, settings=settings)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (found["zero"], found["kv"]) == (zero, kv)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rewritten_as_itself_it_keeps_its_settings_and_every_bit(float_llama, words, tmp_path, recipe):
    made = tmp_path / "made"
    quantize_checkpoint(load_source(str(float_llama)), made, words, recipe=recipe, calibration=CALIBRATION)
    convert_checkpoint(made, tmp_path / "again", "qoq")
    configs = [json.loads((path / "config.json").read_text()) for path in (made, tmp_path / "again")]
    assert configs[0] == configs[1]
    before, after = (load_file(path / "model.safetensors") for path in (made, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("tied", [False, True])
def test_what_lies_around_the_blocks_is_turned(float_llama, words, tmp_path, tied):
    source = AutoModelForCausalLM.from_pretrained(float_llama)
    if tied:
        source.config.tie_word_embeddings = True
        source.tie_weights()
    source.model.norm.weight.data = torch.rand(64).add(0.5).half()
    source.half().save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(float_llama).save_pretrained(tmp_path / "source")
    assert ("lm_head.weight" in load_file(tmp_path / "source" / "model.safetensors")) != tied

    quantize(tmp_path / "source", tmp_path / "out", words)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    turn, model = Turn(64), source.double()
    head = model.model.embed_tokens.weight if tied else model.lm_head.weight
    wanted = {
        "model.embed_tokens.weight": turn.rows(model.model.embed_tokens.weight),
        "lm_head.weight": turn.rows(head * model.model.norm.weight),
        "model.norm.weight": torch.ones(64),
        "model.layers.1.input_layernorm.weight": torch.ones(64),
    }
    for name, tensor in wanted.items():
        assert stored[name].dtype is torch.float16
        torch.testing.assert_close(stored[name].double(), tensor.double(), rtol=1e-3, atol=1e-3)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_without_rotation_everything_around_the_blocks_stays(float_llama, words, tmp_path):
    quantize(float_llama, tmp_path / "out", words, settings={"rotate": False})
    stored, source = (load_file(d / "model.safetensors") for d in (tmp_path / "out", float_llama))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(stored[name], source[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_model_is_the_model(family, float_llama, words, tmp_path):
    """Transforms cancel through the files as well: what is left is the error of rounding, which is small."""
    source = save(*FAMILIES[family], float_llama, tmp_path / "source")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    quantize(source, tmp_path / "out", words)
    (tmp_path / "exact").mkdir()
    model = stored_model(tmp_path / "out", tmp_path / "exact")
    wanted, found = logits(plain, words, source), logits(model, words, source)
    assert float((found - wanted).norm() / wanted.norm()) < 0.25
    shuffled = found[:, torch.randperm(found.shape[1])]
    assert float((shuffled - wanted).norm() / wanted.norm()) > 0.5


def test_blocks_are_calibrated_on_what_the_checkpoint_holds(float_llama, words, tmp_path):
    """In memory, with embeddings rounded as they are stored, the same integers come out."""
    quantize(float_llama, tmp_path / "out", words)
    stored = stored_tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(float_llama, dtype=torch.float32).eval()

    class Rounded(QoqMethod):
        def around(self, architecture, model):
            changes = super().around(architecture, model)
            return {name: lambda w, change=change: change(w).half().float() for name, change in changes.items()}

    tokens = encode(AutoTokenizer.from_pretrained(float_llama), words)
    batches = as_arguments(CALIBRATION.draw(tokens, "words"))
    list(quantize_model(model, batches, Rounded(qoq_config(Scheme(4, 64))), scheme_group_size=64))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(stored[name], parameter, rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_rotated_is_refused_and_can_be_quantized_without(float_llama, words, tmp_path):
    source = save(Gemma2ForCausalLM, GATED, float_llama, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"Gemma2ForCausalLM cannot be rotated: .*settings rotate=False"):
        quantize(source, tmp_path / "out", words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    quantize(source, tmp_path / "out", words, settings={"rotate": False})
    (tmp_path / "exact").mkdir()
    model = stored_model(tmp_path / "out", tmp_path / "exact")
    with as_served(find_architecture(model), model.model.layers):
        assert logits(model, words, source).isfinite().all()
