"""Mixtures of experts, stored expert by expert as AutoAWQ and kernelgraft do, through from_pretrained."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kernelgraft_core.quant.experts import UnfusedExperts
from kernelgraft_core.quant.formats.autoawq import Gemm, Gemv
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_core.runtime.testing import assert_close

IDS = torch.arange(3, 27).unsqueeze(0)
SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.125, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN | {"head_dim": 16, "mlp_only_layers": [0]},
}
EXPERT = {"mixtral": "block_sparse_moe.experts.3.w1", "qwen2_moe": "mlp.experts.3.gate_proj"}
ROUTERS = ["gate", "shared_expert_gate"]


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**SIZES, **MODELS[kind])
    directory = tmp_path_factory.mktemp(kind)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(directory)
    return directory


def load(directory, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("layout", [Gemm(4, 32), Gemv(4, 32), Native(4, 32), Native(3, 32, symmetric=True)], ids=str)
def test_experts_are_loaded_one_by_one_and_saved_bit_for_bit(plugin, kind, source, pack, layout, tmp_path):
    packed, exact = pack(source, layout, ROUTERS)
    stored = load_file(packed / "model.safetensors")
    assert f"model.layers.1.{EXPERT.get(kind, EXPERT['qwen2_moe'])}.qweight" in stored
    model = load(packed)
    experts = [layer for layer in model.modules() if isinstance(layer, UnfusedExperts)]
    assert len(experts) == (1 if kind == "qwen3_moe" else 2)
    assert all(isinstance(layer, PackedLinear) for e in experts[0] for layer in (e.gate_proj, e.up_proj, e.down_proj))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_close("logits", logits(load(exact)), logits(model), 2e-3)

    load(packed, torch.float16).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(saved[name], tensor), name
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_experts_that_are_not_converted_stay_fused(plugin, source, pack):
    packed, exact = pack(source, Gemm(4, 32), [*ROUTERS, "experts"])
    model = load(packed)
    assert not any(isinstance(layer, UnfusedExperts) for layer in model.modules())
    assert_close("logits", logits(load(exact)), logits(model), 2e-3)


def test_quantized_experts_that_are_listed_as_others_are_refused(plugin, source, pack):
    packed, _ = pack(source, Gemm(4, 32), ROUTERS)
    settings = json.loads((packed / "config.json").read_text())
    settings["quantization_config"]["modules_to_not_convert"] = [*ROUTERS, "experts"]
    (packed / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"\.experts\.0\.\w+ is stored quantized, but modules_to_not_convert"):
        load(packed)


def test_an_expert_that_is_missing_is_named(plugin, kind, source, pack):
    from safetensors.torch import save_file

    packed, _ = pack(source, Gemm(4, 32), ROUTERS)
    gone = f"model.layers.1.{EXPERT.get(kind, EXPERT['qwen2_moe'])}."
    kept = {name: t for name, t in load_file(packed / "model.safetensors").items() if not name.startswith(gone)}
    save_file(kept, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.3\.gate_proj: .* has no qweight"):
        load(packed)


def test_generation_runs_the_experts(plugin, source, pack):
    packed, exact = pack(source, Native(3, 32), ROUTERS)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found, wanted = (load(path).generate(IDS, **options) for path in (packed, exact))
    assert torch.equal(found, wanted)
