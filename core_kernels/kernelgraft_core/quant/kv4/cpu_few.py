"""A few queries of each sequence on a CPU: cuts the work into parts and runs the kernels of :mod:`.cpu_kernels`."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import available_threads, parallel_for

from .batch import Scoring, Sequence

LEAST_PART = 512  # tokens of one head that are worth a thread
PARTS_PER_THREAD = 4  # or more, where there are so many heads and sequences


@dataclass(frozen=True)
class _Work:
    """Tables for the kernels, int64, laid out as :mod:`.cpu_kernels` says.

    Attributes:
        parts: one row for each run of tokens of a sequence.
        tokens: one row for each query.
        rows: how many there are in the partial results.
        bounds: which items, of parts times heads, each thread takes.
    """

    parts: np.ndarray[Any, np.dtype[np.int64]]
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    rows: int
    bounds: tuple[int, ...]


def attend_few(
    query: Tensor,
    own: tuple[Tensor, Tensor] | None,
    cache: Tensor,
    block_tables: Tensor,
    sequences: list[Sequence],
    scoring: Scoring,
) -> Tensor:
    """Attention ``(T, Hq, D)`` of sequences that follow each other without gaps; one at least.

    Args:
        query: ``(T, Hq, D)``; own: keys and values ``(T, Hkv, D)``, None where the cache has them.
    """
    tokens, heads, head_size = query.shape
    kv_heads = cache.shape[1]
    queries = query.float().contiguous()
    key, value = (None, None) if own is None else (x.float().contiguous() for x in own)
    work = _cut(sequences, heads, kv_heads, scoring)
    tables = block_tables.int().contiguous()
    partial = torch.empty(work.rows, head_size + 2)
    out = torch.empty(tokens, heads, head_size)
    factors = torch.tensor(_factors(scoring.softmax_scale, scoring.softcap))
    numbers = (
        0, *cache_numbers(cache), queries.data_ptr(), 0 if key is None else key.data_ptr(),
        0 if value is None else value.data_ptr(), heads // kv_heads, tables.data_ptr(), tables.shape[1],
        work.parts.ctypes.data, work.tokens.ctypes.data, factors.data_ptr(), int(scoring.causal),
        scoring.window or 0, partial.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    told = (ctypes.c_int64 * len(numbers))(*numbers)
    attend, merge = _kernels(head_size)
    if len(work.parts):
        parallel_for(attend, told, len(work.parts) * kv_heads, bounds=work.bounds)
    parallel_for(merge, told, tokens * heads, grain=8)
    return out.to(query.dtype)


def cache_numbers(cache: Tensor) -> tuple[int, ...]:
    """Address, strides in bytes, block size and heads, as kernels are told."""
    return cache.data_ptr(), *cache.stride()[:3], cache.shape[2], cache.shape[1]


def _factors(softmax_scale: float, softcap: float | None) -> tuple[float, float]:
    """What products with keys are multiplied with, and the cap, for scores to base 2; with a cap twice as much."""
    if softcap is None:
        return softmax_scale * math.log2(math.e), 0.0
    return softmax_scale * 2 * math.log2(math.e) / softcap, softcap * math.log2(math.e)


def _cut(sequences: list[Sequence], heads: int, kv_heads: int, scoring: Scoring) -> _Work:
    threads = available_threads()
    seen = []
    for each in sequences:
        first, _ = scoring.sees(each.offset, each.context)
        _, last = scoring.sees(each.offset + each.last - each.first - 1, each.context)
        seen.append((first, max(first, last)))
    total = sum(last - first for first, last in seen)
    limit = total if threads == 1 else max(LEAST_PART, -(-total * kv_heads // (threads * PARTS_PER_THREAD)))
    parts: list[tuple[int, ...]] = []
    tokens: list[tuple[int, ...]] = []
    rows = 0
    for each, (first, last) in zip(sequences, seen, strict=True):
        queries = each.last - each.first
        count = -(-(last - first) // max(limit, 1))
        tokens += [(number, each.first, queries, rows, count) for number in range(queries)]
        for part in range(count):
            start, stop = (first + (last - first) * edge // count for edge in (part, part + 1))
            parts.append((each.index, each.first, queries, each.offset, start, stop, rows))
            rows += queries * heads
    return _Work(
        np.array(parts, np.int64).reshape(-1, 7),
        np.array(tokens, np.int64).reshape(-1, 5),
        rows,
        _balance(parts, kv_heads, threads),
    )


def _balance(parts: list[tuple[int, ...]], kv_heads: int, threads: int) -> tuple[int, ...]:
    """Runs of items of about equal cost."""
    items = len(parts) * kv_heads
    if threads == 1 or items <= 1:
        return 0, items
    costs = np.repeat([stop - start + 64 for *_, start, stop, _ in parts], kv_heads).cumsum()
    edges = np.searchsorted(costs, costs[-1] * np.arange(1, threads) / threads, side="left") + 1
    return 0, *np.minimum(edges, items).tolist(), items


@functools.cache
def _kernels(head_size: int) -> tuple[int, int]:
    from kernelgraft_core.quant.packed.cpu_vectors import instruction_set

    from . import cpu_kernels  # compiles, or loads what an earlier process compiled

    made = cpu_kernels.attend_kernel(instruction_set(), head_size), cpu_kernels.merge_kernel(head_size)
    return made[0].address, made[1].address
