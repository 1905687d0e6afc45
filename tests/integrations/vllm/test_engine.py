"""Real vLLM engines on tiny checkpoints: the plugin is found, chosen, run, and computes the right model.

One process starts all engines; each checkpoint's weights are also at hand dequantized, for Transformers to run.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

PROMPTS = [[3, 5, 7, 11], [200, 13, 13, 90, 41, 2, 77]]
CHUNK = 32
LONG_PROMPT = [2 + (37 * index) % 251 for index in range(170)]  # several chunks, and more than one block of the cache
STEPS, LAYERS = 8, 2
RANK, ALPHA = 4, 8


def write_adapter(directory, linears, scale):
    """An adapter of all linear layers in PEFT's layout; what it adds to each weight, ``alpha / r * B @ A``."""
    generator = torch.Generator().manual_seed(7)
    tensors, added = {}, {}
    for index in range(LAYERS):
        for name, (k, n) in linears.items():
            a = torch.randn(RANK, k, generator=generator) / k**0.5
            b = torch.randn(n, RANK, generator=generator) * scale
            layer = f"model.layers.{index}.{name}"
            tensors |= {f"base_model.model.{layer}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
            added[f"{layer}.weight"] = ALPHA / RANK * b @ a
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = sorted(name.partition(".")[2] for name in linears)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    config |= {"target_modules": modules, "bias": "none", "base_model_name_or_path": ""}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return added


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, linears):
    root = tmp_path_factory.mktemp("adapters")
    scales = {"zero": 0.0, "real": 0.1}
    return {name: (root / name, write_adapter(root / name, linears, scale)) for name, scale in scales.items()}


@pytest.fixture(scope="module")
def session(run_engines, tiny_llama, tiny_native_llama, adapters):
    named = {"model": str(tiny_llama.quantized), "quantization": "kernelgraft_awq"}
    seen = run_engines(
        [
            {
                "engine": named
                | {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK, "enable_prefix_caching": True},
                "requests": [{"prompts": prompts} for prompts in (PROMPTS, [LONG_PROMPT], [LONG_PROMPT])],
            },
            {
                "engine": named | {"enable_lora": True, "max_lora_rank": 8},
                "requests": [
                    {"prompts": PROMPTS, "adapter": adapter and str(adapter)}
                    for adapter in (None, adapters["zero"][0], adapters["real"][0])
                ],
            },
            {"engine": {"model": str(tiny_native_llama.quantized)}, "requests": [{"prompts": PROMPTS}]},
        ]
    )
    return dict(zip(("awq", "lora", "native"), seen, strict=True))


def float_model(llama, added=None):
    """The dequantized weights in Transformers, with ``added`` added to them."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama.dequantized, dtype=torch.float32)
    for name, change in (added or {}).items():
        model.get_parameter(name).data += change
    return model


def test_tokens_and_log_probabilities_are_those_of_the_dequantized_model(session, tiny_llama, assert_computes):
    [seen, *_] = session["awq"]["requests"]
    assert_computes(float_model(tiny_llama), PROMPTS, seen)
    assert seen["text"][0].split() == [f"t{token}" for token in seen["tokens"][0]]


def test_vllm_keeps_its_own_awq_unless_the_user_names_ours(session):
    assert session["awq"]["method_unless_named"] == "awq"
    assert session["awq"]["method"] == "kernelgraft_awq"


def test_exactly_the_quantized_layers_are_ours(session):
    ours = {name for name, method in session["awq"]["layers"].items() if method == "KernelgraftAWQLinearMethod"}
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert ours == {f"model.layers.{index}.{name}" for index in range(LAYERS) for name in names}
    assert session["awq"]["layers"]["lm_head"] != "KernelgraftAWQLinearMethod"


def test_every_quantized_layer_runs_on_our_op_at_every_step(session):
    shapes = ("256x16", "128x16", "512x16", "128x32")  # qkv, o, gate with up, down: N x K / 8
    calls = session["awq"]["requests"][0]["calls"]
    assert calls == {f"w4a16_linear {shape}": STEPS * LAYERS for shape in shapes}


def test_a_prompt_computed_in_chunks_gives_what_it_gives_at_once(session, tiny_llama, assert_computes):
    [_, first, _] = session["awq"]["requests"]
    assert first["cached"] == [0]
    chunks = -(-len(LONG_PROMPT) // CHUNK)
    assert first["calls"]["w4a16_linear 256x16"] == LAYERS * (chunks + STEPS - 1)
    assert_computes(float_model(tiny_llama), [LONG_PROMPT], first)


def test_a_prefix_taken_from_the_cache_changes_nothing(session, tiny_llama, assert_computes):
    [_, first, second] = session["awq"]["requests"]
    assert second["cached"][0] > len(LONG_PROMPT) // 2
    assert second["calls"]["w4a16_linear 256x16"] < first["calls"]["w4a16_linear 256x16"]
    assert second["tokens"] == first["tokens"]
    assert_computes(float_model(tiny_llama), [LONG_PROMPT], second)


def test_without_an_adapter_and_with_one_of_zeros_the_base_answers(session, tiny_llama, adapters, assert_computes):
    [base, zero, _] = session["lora"]["requests"]
    assert_computes(float_model(tiny_llama), PROMPTS, base)
    assert zero["tokens"] == base["tokens"]
    assert zero["logprobs"] == base["logprobs"]


def test_an_adapter_answers_like_the_model_it_was_merged_into(session, tiny_llama, adapters, assert_computes):
    [base, _, adapted] = session["lora"]["requests"]
    assert adapted["tokens"] != base["tokens"]
    assert_computes(float_model(tiny_llama, adapters["real"][1]), PROMPTS, adapted)
    assert sum(adapted["calls"].values()) == 4 * STEPS * LAYERS


def test_our_own_format_is_chosen_by_the_checkpoint_alone(session, tiny_native_llama, assert_computes):
    native = session["native"]
    assert native["method"] == native["method_unless_named"] == "kernelgraft_awq"
    [seen] = native["requests"]
    assert_computes(float_model(tiny_native_llama), PROMPTS, seen)
    shapes = ("256x8", "128x8", "512x8", "128x16")  # N x K / 16
    assert seen["calls"] == {f"w3a16_linear {shape}": STEPS * LAYERS for shape in shapes}


@pytest.mark.parametrize(("allowed", "offered"), [("awq", True), ("mm-sp", False)])
def test_the_allow_list_hides_the_method_from_vllm(vllm_environment, allowed, offered):
    script = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "print('kernelgraft_awq' in QUANTIZATION_METHODS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=vllm_environment | {"KERNELGRAFT_PLUGINS": allowed},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.split()[-1] == str(offered)
