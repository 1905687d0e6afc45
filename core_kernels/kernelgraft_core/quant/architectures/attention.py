"""Where queries, keys, values and the output of a block's attention are: what transforms of single heads need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.errors import UnsupportedModelError

from .adapter import linear_layer

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rows:
    """Output channels of a linear layer: spans ``(start, stop)`` in the order of heads."""

    module: str
    spans: Spans

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def index(self, device: torch.device) -> Tensor:
        """Their numbers, int64."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.spans])


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    Attributes:
        q, k, v: their rows, head after head.
        output: the linear layer behind the heads.
        head_size: channels of a head.
        rotary: channels of a head, from its first, that rotary embeddings turn in pairs; 0 without them.
        interleaved: whether these pairs are neighbours, ``(2 i, 2 i + 1)``, and not ``(i, i + rotary / 2)``.
        q_norm, k_norm: norms of each head's queries and keys, where there are any; they come before the embeddings.
        norm_offset: what those norms add to their weight.
    """

    q: Rows
    k: Rows
    v: Rows
    output: str
    head_size: int
    rotary: int
    q_norm: str | None = None
    k_norm: str | None = None
    norm_offset: float = 0.0
    interleaved: bool = False

    @property
    def heads(self) -> int:
        return self.q.count // self.head_size

    @property
    def kv_heads(self) -> int:
        return self.k.count // self.head_size


def separate_attention(
    block: nn.Module, *, output: str = "self_attn.o_proj", rotary: bool = True, norm_offset: float = 0.0
) -> Attention:
    """Queries, keys and values in linear layers of their own."""
    module = block.get_submodule("self_attn")
    size = _head_size(module)
    q, k, v = (_whole(block, f"self_attn.{name}_proj") for name in "qkv")
    turned = _rotary(module, size) if rotary else 0
    if not hasattr(module, "q_norm"):
        return Attention(q, k, v, output, size, turned)
    return Attention(q, k, v, output, size, turned, "self_attn.q_norm", "self_attn.k_norm", norm_offset)


def fused_attention(block: nn.Module) -> Attention:
    """All queries, all keys, all values in one linear layer: Phi-3."""
    module = block.get_submodule("self_attn")
    size = _head_size(module)
    heads = linear_layer(block, "self_attn.o_proj").in_features
    both = linear_layer(block, "self_attn.qkv_proj").out_features - heads
    cuts = (0, heads, heads + both // 2, heads + both)
    q, k, v = (Rows("self_attn.qkv_proj", ((cuts[i], cuts[i + 1]),)) for i in range(3))
    return Attention(q, k, v, "self_attn.o_proj", size, _rotary(module, size))


def interleaved_attention(block: nn.Module) -> Attention:
    """Each head's queries, keys and values side by side in one linear layer: GPT-NeoX."""
    module = block.get_submodule("attention")
    size = module.head_size
    assert isinstance(size, int)
    heads = linear_layer(block, "attention.dense").in_features // size
    q, k, v = (
        Rows("attention.query_key_value", tuple((3 * h * size + i * size, 3 * h * size + (i + 1) * size)
             for h in range(heads)))
        for i in range(3)
    )  # fmt: skip
    return Attention(q, k, v, "attention.dense", size, _rotary(module, size))


def _whole(block: nn.Module, name: str) -> Rows:
    return Rows(name, ((0, linear_layer(block, name).out_features),))


def _head_size(module: nn.Module) -> int:
    size = module.head_dim
    assert isinstance(size, int)
    return size


def _rotary(module: nn.Module, size: int) -> int:
    """From the config: newer versions of Transformers keep the share among the rotary embeddings' parameters."""
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        shares = {value.get("partial_rotary_factor", 1.0) for value in parameters.values()}
        if len(shares) > 1:
            raise UnsupportedModelError(f"rotary embeddings turn different shares of a head: {sorted(shares)}")
        share = shares.pop()
    else:
        share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
        share = share or getattr(config, "rotary_pct", None) or 1.0
    return int(size * share)
