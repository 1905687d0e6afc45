"""Tiny checkpoints: AutoAWQ's written here from the published layout, not with the packer that is under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernelgraft_core.quant.weights import pack_weight

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 64
ENGINES_TIMEOUT_S = 600


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer as a checkpoint stores it, and what it means: ``weight`` float64 ``(N, K)``."""

    tensors: dict[str, Tensor]
    weight: Tensor


def _words(values: np.ndarray) -> Tensor:
    """Rows of 4-bit integers, eight neighbouring columns to a word."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def _awq_layer(k: int, n: int, group: int, seed: int = 0) -> StoredLayer:
    random = np.random.default_rng(seed)
    group = k if group == -1 else group
    q = random.integers(0, 16, (k, n))
    zeros = random.integers(5, 11, (k // group, n))
    scales = (random.uniform(0.2, 1.0, (k // group, n)) / (4 * np.sqrt(k))).astype(np.float16)
    weight = (q - zeros.repeat(group, 0)) * scales.astype(np.float64).repeat(group, 0)
    tensors = {"qweight": _words(q), "qzeros": _words(zeros), "scales": torch.from_numpy(scales)}
    return StoredLayer(tensors, torch.from_numpy(weight.T.copy()))


def _native_layer(k: int, n: int, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> StoredLayer:
    group = k if group_size == -1 else group_size
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = ((0.2 + 0.8 * torch.rand(n, k // group, generator=generator)) * 4 / (1 << bits) / k**0.5).half()
    zeros = torch.randint(1 << (bits - 2), 3 << (bits - 2), scales.shape, generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    packed = pack_weight(q, scales, zeros, bits)
    tensors = dict(zip((*packed.planes, "scales", "zeros"), packed.tensors, strict=True))
    if symmetric:
        del tensors["zeros"]
    spread = [part.double().repeat_interleave(group, 1) for part in (zeros, scales)]
    return StoredLayer(tensors, (q.double() - spread[0]) * spread[1])


def _qoq_layer(k: int, n: int, group: int, zero: str = "pre", seed: int = 0) -> StoredLayer:
    """Weights of about 1 / sqrt(k), rounded progressively; the formula of the format, not its packer."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(n, k, generator=generator, dtype=torch.float64) / k**0.5
    whole_rows = group == -1
    groups = wanted.view(n, -1, k if whole_rows else group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if whole_rows:
        scale = ((high - low) / 15).half().double()
        step, offset = torch.ones_like(scale), (-low / scale).round()
    else:
        scale = (wanted.abs().amax(1, keepdim=True) / 119).half().double()
        step = ((high - low) / scale / 15).round().clamp(min=1)
        offset = (-low / scale / step).round() * step if zero == "pre" else (-low / scale).round()
    top = ((127 + offset) / step).floor().clamp(max=15).unsqueeze(-1)
    q = ((groups / scale.unsqueeze(-1) + offset.unsqueeze(-1)) / step.unsqueeze(-1)).round().clamp(min=0).minimum(top)
    weight = ((q * step.unsqueeze(-1) - offset.unsqueeze(-1)) * scale.unsqueeze(-1)).view(n, k)
    q = q.to(torch.uint8).view(n, k)
    tensors = {"qweight": q[:, ::2] | q[:, 1::2] << 4, "scale": scale.half().flatten()}
    if whole_rows:
        tensors["zero"] = offset.to(torch.uint8).flatten()
    else:
        stored = offset / step if zero == "pre" else offset
        tensors |= {"group_scale": step.to(torch.uint8), "group_zero": stored.to(torch.uint8)}
    return StoredLayer(tensors, weight)


@pytest.fixture(scope="session")
def qoq_layer() -> Callable[..., StoredLayer]:
    """``qoq_layer(k, n, group, zero="pre", seed=0)``."""
    return _qoq_layer


@pytest.fixture(scope="session")
def awq_layer() -> Callable[..., StoredLayer]:
    """``awq_layer(k, n, group, seed=0)``."""
    return _awq_layer


@pytest.fixture(scope="session")
def native_layer() -> Callable[..., StoredLayer]:
    """``native_layer(k, n, bits, group_size, symmetric, seed=0)``."""
    return _native_layer


@pytest.fixture
def be_rank(monkeypatch):
    """``be_rank(rank, size)``: build and load as that rank. Only loaders look at these; nothing is communicated."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def pretend(rank: int, size: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    return pretend


@pytest.fixture(scope="session")
def assert_one_op() -> Callable[[torch.nn.Module, int, Any], None]:
    """``assert_one_op(layer, k, op)``: torch.compile sees nothing but ``op``, for any number of tokens."""

    def check(layer: torch.nn.Module, k: int, op: Any) -> None:
        graphs = []

        def backend(graph, inputs):
            graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return graph

        compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend=backend)
        for tokens in (4, 9, 33):
            x = torch.randn(tokens, k)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), layer(x)[0])
        assert graphs == [[op]]

        traced = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(traced(x), layer(x)[0])

    return check


@dataclass(frozen=True)
class TinyLlama:
    """A random model as a quantized checkpoint, and dequantized in float32. Its words are t0, t1, ... t255."""

    quantized: Path
    dequantized: Path


SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}
KV = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
LINEARS = {
    "self_attn.q_proj": (SHAPE["hidden_size"], SHAPE["hidden_size"]),
    "self_attn.k_proj": (SHAPE["hidden_size"], KV),
    "self_attn.v_proj": (SHAPE["hidden_size"], KV),
    "self_attn.o_proj": (SHAPE["hidden_size"], SHAPE["hidden_size"]),
    "mlp.gate_proj": (SHAPE["hidden_size"], SHAPE["intermediate_size"]),
    "mlp.up_proj": (SHAPE["hidden_size"], SHAPE["intermediate_size"]),
    "mlp.down_proj": (SHAPE["intermediate_size"], SHAPE["hidden_size"]),
}


@pytest.fixture(scope="session")
def linears() -> dict[str, tuple[int, int]]:
    """K and N of the linear layers in each block of the tiny models."""
    return LINEARS


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory) -> dict[str, str]:
    """Environment of a process that starts vLLM on a small machine, without network."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("KERNELGRAFT_PLUGINS", "VLLM_PLUGINS")
    }
    return inherited | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm_cache")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # vLLM takes every core for itself; tests share the machine
    }


@pytest.fixture(scope="session")
def run_engines(vllm_environment, tmp_path_factory):
    """``run_engines(runs)``: what ``engine_session.py`` saw, run in a process of its own."""

    def run(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp("session")
        (directory / "runs.json").write_text(json.dumps(runs))
        script = Path(__file__).with_name("engine_session.py")
        command = [sys.executable, str(script), str(directory / "runs.json"), str(directory / "seen.json")]
        done = subprocess.run(
            command, env=vllm_environment, capture_output=True, text=True, timeout=ENGINES_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return json.loads((directory / "seen.json").read_text())

    return run


def _config(**more: object) -> dict[str, object]:
    return (
        SHAPE
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "float32",
        }
        | more
    )


def _write(directory: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{index}": index for index in range(SHAPE["vocab_size"])},
            "unk_token": "t2",
        },
    }
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t0", "eos_token": "t1"}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    files = {"config": config, "tokenizer": tokenizer, "tokenizer_config": tokenizer_config}
    for file, content in files.items():
        (directory / f"{file}.json").write_text(json.dumps(content))
    return directory


def _llama(root: Path, settings: dict[str, object], new_layer: Callable[[int, int, int], StoredLayer]) -> TinyLlama:
    """The model whose linear layers are ``new_layer(k, n, seed)``."""
    hidden = SHAPE["hidden_size"]
    generator = torch.Generator().manual_seed(0)
    shared = {
        "model.embed_tokens.weight": torch.randn(SHAPE["vocab_size"], hidden, generator=generator),
        "lm_head.weight": torch.randn(SHAPE["vocab_size"], hidden, generator=generator) / 4,
        "model.norm.weight": torch.ones(hidden),
    }
    quantized, plain = dict(shared), dict(shared)
    for index in range(SHAPE["num_hidden_layers"]):
        block = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            quantized[f"{block}.{norm}.weight"] = plain[f"{block}.{norm}.weight"] = torch.ones(hidden)
        for seed, (name, (k, n)) in enumerate(LINEARS.items()):
            layer = new_layer(k, n, 100 * index + seed)
            quantized |= {f"{block}.{name}.{part}": tensor for part, tensor in layer.tensors.items()}
            plain[f"{block}.{name}.weight"] = layer.weight.float()
    return TinyLlama(
        _write(root / "quantized", quantized, _config(quantization_config=settings)),
        _write(root / "dequantized", plain, _config()),
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> TinyLlama:
    """In AutoAWQ's layout."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _llama(tmp_path_factory.mktemp("awq"), settings, lambda k, n, seed: _awq_layer(k, n, GROUP, seed))


@pytest.fixture(scope="session")
def tiny_native_llama(tmp_path_factory) -> TinyLlama:
    """In kernelgraft's own layout, 3 bits."""
    settings = {"quant_method": "kernelgraft_awq", "bits": 3, "group_size": 32, "symmetric": False}
    settings |= {"modules_to_not_convert": None, "format_version": 1}
    return _llama(
        tmp_path_factory.mktemp("native"), settings, lambda k, n, seed: _native_layer(k, n, 3, 32, False, seed)
    )


@pytest.fixture(scope="session")
def tiny_qoq_llama(tmp_path_factory) -> TinyLlama:
    """In our format for 8-bit activations, in groups of 64."""
    settings = {"quant_method": "qoq", "bits": 4, "group_size": GROUP, "zero": "post", "act_bits": 8}
    settings |= {"kv": {"bits": 4, "smooth": True}, "modules_to_not_convert": None, "format_version": 1}
    return _llama(tmp_path_factory.mktemp("qoq"), settings, lambda k, n, seed: _qoq_layer(k, n, GROUP, "post", seed))


@pytest.fixture(scope="session")
def assert_computes() -> Callable[..., None]:
    """``assert_computes(model, prompts, seen)``: an engine's tokens, and log-probabilities of the likeliest, are right.

    They are compared with those of a float32 model of Transformers, which sees each prompt at once. ``tolerance`` is
    what log-probabilities may differ by.
    """

    def check(model: Any, prompts: list[list[int]], seen: dict[str, Any], tolerance: float = 1e-3) -> None:
        for prompt, tokens, steps in zip(prompts, seen["tokens"], seen["logprobs"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            best = expected.topk(2)
            margin = (best.values[:, 0] - best.values[:, 1]).min()
            assert margin > tolerance, "two tokens are too close for this to prove anything: change the seed"
            assert tokens == best.indices[:, 0].tolist()
            for row, found in zip(expected, steps, strict=True):
                assert max(abs(row[int(token)].item() - value) for token, value in found.items()) < tolerance

    return check
