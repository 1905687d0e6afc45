"""vLLM engines on tiny mixtures of experts, quantized by kernelgraft, against Transformers on the same checkpoints."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("transformers")

import transformers

import kernelgraft
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

pytestmark = pytest.mark.slow

PROMPTS = [[3, 5, 7, 11], [200, 13, 13, 90, 41, 2, 77]]
STEPS, LAYERS, EXPERTS = 8, 2, 4
SIZES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.125,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 64, "mlp_only_layers": [0], "norm_topk_prob": True}
MODELS = {  # of the first block of both Qwens the MLP is dense
    "qwen3_moe": (QWEN | {"head_dim": 32}, 4),
    "qwen2_moe": (QWEN | {"shared_expert_intermediate_size": 96}, 4),
    "mixtral": ({"num_local_experts": EXPERTS}, 3),
}
MIXED_LAYERS = {"qwen3_moe": 1, "qwen2_moe": 1, "mixtral": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_llama):
    """Per kind of model a checkpoint: 4 bits in AutoAWQ's layout, 3 in our own."""
    words = " ".join(f"t{index}" for index in torch.randint(2, 256, (600,)).tolist())
    made = {}
    for kind, (sizes, bits) in MODELS.items():
        torch.manual_seed(1)
        root = tmp_path_factory.mktemp(kind)
        config = transformers.CONFIG_MAPPING[kind](**SIZES, **sizes)
        transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(root / "float")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama.quantized / file, root / "float" / file)
        made[kind] = root / "quantized"
        quantize_checkpoint(
            load_source(str(root / "float")),
            made[kind],
            words,
            recipe="rtn",
            bits=bits,
            group_size=32,
            calibration=Calibration(samples=2, length=32),
        )
    return made


@pytest.fixture(scope="module")
def session(run_engines, checkpoints):
    named = {4: {"quantization": "kernelgraft_awq"}, 3: {}}
    engines = {kind: {"model": str(checkpoints[kind]), **named[bits]} for kind, (_, bits) in MODELS.items()}
    engines["compiled"] = engines["qwen3_moe"] | {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    runs = [{"engine": engine, "requests": [{"prompts": PROMPTS}]} for engine in engines.values()]
    return dict(zip(engines, run_engines(runs), strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_and_log_probabilities_are_those_of_transformers(session, checkpoints, assert_computes, kind):
    with kernelgraft.load_plugin("awq", host="transformers"):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=torch.float32)
        assert_computes(model, PROMPTS, session[kind]["requests"][0])


@pytest.mark.parametrize("kind", MODELS)
def test_experts_run_on_our_op_and_routers_do_not(session, kind):
    layers = session[kind]["layers"]
    experts = [name for name, method in layers.items() if method == "KernelgraftExpertsMethod"]
    assert len(experts) == MIXED_LAYERS[kind]
    routers = [method for name, method in layers.items() if name.endswith(".gate")]
    assert not any(method.startswith("Kernelgraft") for method in routers)
    [calls] = [n for op, n in session[kind]["requests"][0]["calls"].items() if op.startswith("routed_experts")]
    assert calls == STEPS * MIXED_LAYERS[kind]


def test_a_model_traced_whole_by_the_compiler_computes_the_same(session):
    [eager], [compiled] = session["qwen3_moe"]["requests"], session["compiled"]["requests"]
    assert compiled["tokens"] == eager["tokens"]
    assert compiled["calls"] == eager["calls"]
    for steps, expected_steps in zip(compiled["logprobs"], eager["logprobs"], strict=True):
        for step, expected in zip(steps, expected_steps, strict=True):
            both = step.keys() & expected.keys()
            assert max(abs(step[token] - expected[token]) for token in both) < 1e-3
