"""How the CPU kernels' work is cut: tables of parts and of queries, and which thread takes what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernelgraft_core.runtime.threads import available_threads

from .batch import Scoring, Sequence

FEW = 8  # queries of a sequence whose own keys the merging kernel attends to
ROWS = 64  # queries, in all heads that share keys, of a part: what is kept of them stays in the second-level cache
LEAST_PART = 512  # tokens of one head that are worth a thread
PARTS_PER_THREAD = 4  # or more, where there are so many heads and sequences
TOKEN_COST = 64  # tokens that a part costs beside those it reads

Table = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Work:
    """Tables for the kernels, laid out as :mod:`.cpu_kernels` says.

    Attributes:
        parts: one row for each run of tokens and block of queries.
        tokens: one row for each query.
        rows: how many there are in the partial results.
        block: how many queries of a sequence are done together.
        own: sequences whose own keys are attended to elsewhere, with the row where the results of each block begin.
        bounds: which items, of parts times heads, each thread takes.
    """

    parts: Table
    tokens: Table
    rows: int
    block: int
    own: tuple[tuple[Sequence, list[int]], ...]
    bounds: tuple[int, ...]


def cut_work(sequences: list[Sequence], heads: int, kv_heads: int, scoring: Scoring, has_own: bool) -> Work:
    """Cut attention of sequences into parts that threads can take.

    Args:
        heads, kv_heads: of queries and of the cache.
        has_own: the queries' own keys are not in the cache.
    """
    threads, size = available_threads(), max(1, ROWS * kv_heads // heads)
    blocks = [(each, *block) for each in sequences for block in _blocks(each, size, scoring)]
    total = sum(last - first for *_, first, last in blocks)
    limit = total if threads == 1 else max(LEAST_PART, -(-total * kv_heads // (threads * PARTS_PER_THREAD)))
    parts: list[tuple[int, ...]] = []
    tokens: list[tuple[int, ...]] = []
    beside: dict[int, tuple[Sequence, list[int]]] = {}
    rows = 0
    for each, start, stop, first, last in blocks:
        queries, own = stop - start, each.last - each.first if has_own else 0
        count = -(-(last - first) // max(limit, 1))
        more, own = (0, own) if own <= FEW else (1, 0)
        tokens += [(number, queries, rows, count + more, start + number, each.first, own) for number in range(queries)]
        for part in range(count):
            low, high = (first + (last - first) * edge // count for edge in (part, part + 1))
            parts.append((each.index, each.first + start, queries, each.offset + start, low, high, rows))
            rows += queries * heads
        if more:
            beside.setdefault(each.index, (each, []))[1].append(rows)
            rows += queries * heads
    return Work(
        np.array(parts, np.int64).reshape(-1, 7),
        np.array(tokens, np.int64).reshape(-1, 7),
        rows,
        size,
        tuple(beside.values()),
        _balance(parts, kv_heads, threads),
    )


def _blocks(sequence: Sequence, size: int, scoring: Scoring) -> Iterator[tuple[int, int, int, int]]:
    """A sequence's queries, ``size`` at a time: the first, the last, and the cached tokens that they see."""
    queries = sequence.last - sequence.first
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        first, _ = scoring.sees(sequence.offset + start, sequence.context)
        _, last = scoring.sees(sequence.offset + stop - 1, sequence.context)
        yield start, stop, first, max(first, last)


def _balance(parts: list[tuple[int, ...]], kv_heads: int, threads: int) -> tuple[int, ...]:
    """Runs of items of about equal cost."""
    items = len(parts) * kv_heads
    if threads == 1 or items <= 1:
        return 0, items
    costs = [size * (high - low + TOKEN_COST) for _, _, size, _, low, high, _ in parts]
    ends = np.repeat(costs, kv_heads).cumsum()
    edges = np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads) + 1
    return 0, *np.minimum(edges, items).tolist(), items
