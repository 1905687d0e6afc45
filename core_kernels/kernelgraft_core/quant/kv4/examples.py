"""Arguments for the ops of the 4-bit cache, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from . import reference
from .rows import new_cache

TUNED: tuple[str, ...] = ()
SEQUENCES, CONTEXT, BLOCK_SIZE, HEADS, KV_HEADS, HEAD_SIZE = 3, 75, 16, 8, 2, 64


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call.

    Args:
        dtype: of queries, keys and values. Sizes of linear layers are taken and mean nothing here.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, HEAD_SIZE, generator=generator).to(dtype)

    blocks = -(-CONTEXT // BLOCK_SIZE)
    tables = torch.randperm(SEQUENCES * blocks, generator=generator).view(SEQUENCES, blocks).int()
    tokens = torch.arange(CONTEXT)
    slots = (tables[:, tokens // BLOCK_SIZE].long() * BLOCK_SIZE + tokens % BLOCK_SIZE).flatten()
    empty = new_cache(SEQUENCES * blocks, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    key, value = draw(len(slots), KV_HEADS), draw(len(slots), KV_HEADS)
    cache = empty.clone()
    reference.kv4_append(key, value, cache, slots)
    queries = draw(SEQUENCES, HEADS), draw(SEQUENCES, KV_HEADS), draw(SEQUENCES, KV_HEADS)
    lengths, starts = torch.full((SEQUENCES,), CONTEXT).int(), torch.arange(SEQUENCES + 1).int()
    append = (x.to(device) for x in (key, value, empty, slots))
    attend = (x.to(device) for x in (*queries, cache, tables, lengths, starts))
    return {"kv4_append": tuple(append), "kv4_attention": (*attend, HEAD_SIZE**-0.5, True, None, None)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers; caches are measured by ``benchmarks/cases.py``."""
