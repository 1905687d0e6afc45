"""The sequences of a batch as Python numbers, checked before anything reads memory by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Sequence:
    """One sequence that has queries.

    Attributes:
        index: its row in the block table.
        first, last: its queries are tokens ``first`` to ``last - 1`` of the batch.
        context: how many of its tokens are read from the cache.
        offset: position of its first query; keys in the cache have positions 0 to ``context - 1``.
    """

    index: int
    first: int
    last: int
    context: int
    offset: int


@dataclass(frozen=True)
class Scoring:
    """What becomes of ``query @ key``, and which keys a query sees; as for :func:`.ops.kv4_attention`."""

    softmax_scale: float
    causal: bool
    window: int | None
    softcap: float | None

    def sees(self, position: int, keys: int) -> tuple[int, int]:
        """The first and last positions, of ``keys`` that there are, which a query at ``position`` sees."""
        first, last = 0, keys
        if self.window is not None:
            first, last = max(0, position - self.window + 1), min(keys, position + self.window)
        return first, min(last, position + 1) if self.causal else last

    @property
    def factors(self) -> tuple[float, float]:
        """What products with keys are multiplied with, and the cap, for scores to base 2.

        With a cap, products are twice the argument of tanh: ``tanh(y) = 1 - 2 / (exp(2 y) + 1)``. 0 is no cap.
        """
        if self.softcap is None:
            return self.softmax_scale * LOG2E, 0.0
        return self.softmax_scale * 2 * LOG2E / self.softcap, self.softcap * LOG2E

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The same for positions ``(Q,)`` and ``(K,)``: bool ``(Q, K)``."""
        distance = queries.unsqueeze(1) - keys
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= distance.abs() < self.window
        return seen


def read_sequences(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    has_chunk: bool,
) -> list[Sequence]:
    """The sequences with queries, in order. On a GPU this waits for the device.

    Args:
        has_chunk: the keys of the queries' own tokens are not in the cache.

    Raises:
        ValueError: sequences do not follow each other within the queries, or would read beyond their block table or
            the cache; the message names the value.
    """
    starts, contexts = query_start.tolist(), context_lens.tolist()
    tokens, block_size = query.shape[0], cache.shape[2]
    if starts[0] != 0 or starts[-1] > tokens or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"query_start is {_short(starts)}, expected to ascend from 0 to at most {tokens}")
    room = block_tables.shape[1] * block_size
    found = []
    for index, context in enumerate(contexts):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        least = 0 if has_chunk else last - first
        if not least <= context <= room:
            why = "" if has_chunk else f": without key it counts the {least} queries too"
            raise ValueError(f"context_lens[{index}] is {context}, expected {least} to {room}{why}")
        found.append(Sequence(index, first, last, context, context if has_chunk else context - last + first))
    check_blocks(found, block_tables, cache)
    return found


def check_blocks(sequences: list[Sequence], block_tables: Tensor, cache: Tensor) -> None:
    """Refuse a block table that sends a sequence outside the cache, in the part that is read."""
    if not sequences:
        return
    block_size = cache.shape[2]
    tables = block_tables.cpu().numpy()
    used = np.zeros(len(tables), np.int64)
    used[[sequence.index for sequence in sequences]] = [-(-sequence.context // block_size) for sequence in sequences]
    outside = (tables < 0) | (tables >= cache.shape[0])
    outside &= np.arange(tables.shape[1]) < used[:, None]
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        block = tables[row, column]
        raise ValueError(f"block_tables[{row}, {column}] is {block}, the cache has blocks 0 to {cache.shape[0] - 1}")


def check_slots(slot_mapping: Tensor, cache: Tensor) -> None:
    """Refuse slots beyond the cache.

    Raises:
        ValueError: with the first of them.
    """
    slots = cache.shape[0] * cache.shape[2]
    bad = (slot_mapping >= slots).nonzero()
    if len(bad):
        index = int(bad[0])
        raise ValueError(f"slot_mapping[{index}] is {int(slot_mapping[index])}, the cache has slots 0 to {slots - 1}")


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"[{', '.join(map(str, numbers[:12]))}, ...]"
