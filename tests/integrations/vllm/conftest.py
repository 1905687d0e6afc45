"""Tiny AutoAWQ checkpoints, written here from the published layout and not with the packer that is under test."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 64


@dataclass(frozen=True)
class AwqLayer:
    """One linear layer as AutoAWQ stores it, and what it means: ``weight`` float64 ``(N, K)``."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    weight: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.{part}": getattr(self, part) for part in ("qweight", "qzeros", "scales")}


def _words(values: np.ndarray) -> Tensor:
    """Rows of 4-bit integers, eight neighbouring columns to a word."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def _awq_layer(k: int, n: int, group: int, seed: int) -> AwqLayer:
    random = np.random.default_rng(seed)
    group = k if group == -1 else group
    q = random.integers(0, 16, (k, n))
    zeros = random.integers(5, 11, (k // group, n))
    scales = (random.uniform(0.2, 1.0, (k // group, n)) / (4 * np.sqrt(k))).astype(np.float16)
    weight = (q - zeros.repeat(group, 0)) * scales.astype(np.float64).repeat(group, 0)
    return AwqLayer(_words(q), _words(zeros), torch.from_numpy(scales), torch.from_numpy(weight.T.copy()))


@pytest.fixture
def awq_layer():
    """``awq_layer(k, n, group, seed=0)``."""
    return lambda k, n, group, seed=0: _awq_layer(k, n, group, seed)


@dataclass(frozen=True)
class TinyLlama:
    """The same random model twice: as an AWQ checkpoint, and dequantized in float32. Its words are t0, t1, ... t255."""

    awq: Path
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
def tiny_llama(tmp_path_factory) -> TinyLlama:
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
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
        for seed, (name, (k, n)) in enumerate(linears.items()):
            layer = _awq_layer(k, n, GROUP, 100 * index + seed)
            quantized |= layer.tensors(f"{block}.{name}")
            plain[f"{block}.{name}.weight"] = layer.weight.float()

    config = SHAPE | {
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
    awq = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
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
    root = tmp_path_factory.mktemp("tiny_llama")
    for name, tensors, extra in (("awq", quantized, {"quantization_config": awq}), ("dequantized", plain, {})):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
        files = {"config": config | extra, "tokenizer": tokenizer, "tokenizer_config": tokenizer_config}
        for file, content in files.items():
            (root / name / f"{file}.json").write_text(json.dumps(content))
    return TinyLlama(root / "awq", root / "dequantized")
