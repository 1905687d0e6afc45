"""The ops of the 4-bit cache on a CPU: compiled kernels for a few queries of a sequence, matrix products for many.

A few queries are bound by reading the cache, and the kernels of :mod:`.cpu_kernels` read it as it is. For a chunk of a
prompt cached tokens are dequantized, piece by piece, for matrix products (:mod:`.cpu_chunks`).
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase

from .batch import Scoring, Sequence, check_slots, read_sequences
from .cpu_chunks import attend_chunk
from .cpu_few import attend_few, cache_numbers

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW = 8  # queries of a sequence that the kernels take
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def kv4_append(key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_slots(slot_mapping, cache)
    tokens, heads, head_size = key.shape
    if tokens == 0:
        return
    launch = _append_launch(tokens * heads, head_size)
    key, value, slots = key.float().contiguous(), value.float().contiguous(), slot_mapping.long().contiguous()
    launch(*cache_numbers(cache), key.data_ptr(), value.data_ptr(), slots.data_ptr())


def kv4_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    softmax_scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    scoring = Scoring(softmax_scale, causal, window, softcap)
    sequences = read_sequences(query, cache, block_tables, context_lens, query_start, key is not None)
    own = None if key is None or value is None else (key, value)
    few = [sequence for sequence in sequences if sequence.last - sequence.first <= FEW]
    if few and len(few) == len(sequences) and few[-1].last == len(query):
        return attend_few(query, own, cache, block_tables, few, scoring)
    out = torch.zeros(query.shape, dtype=query.dtype)
    if few:
        places, gathered = _gather(few)
        chosen = None if own is None else (own[0][places], own[1][places])
        out[places] = attend_few(query[places], chosen, cache, block_tables, gathered, scoring)
    for sequence in sequences:
        if sequence.last - sequence.first > FEW:
            here = slice(sequence.first, sequence.last)
            chosen = None if own is None else (own[0][here], own[1][here])
            table = block_tables[sequence.index]
            out[here] = attend_chunk(query[here], chosen, cache, table, sequence, scoring)
    return out


def _gather(sequences: list[Sequence]) -> tuple[Tensor, list[Sequence]]:
    """Where the queries of some sequences are, and the sequences as they are when only those queries are there."""
    moved: list[Sequence] = []
    for each in sequences:
        first = moved[-1].last if moved else 0
        moved.append(Sequence(each.index, first, first + each.last - each.first, each.context, each.offset))
    return torch.cat([torch.arange(each.first, each.last) for each in sequences]), moved


@functools.lru_cache(maxsize=1024)
def _append_launch(rows: int, head_size: int) -> Launch:
    from .cpu_kernels import append_kernel  # compiles, or loads what an earlier process compiled

    return Launch(Phase(append_kernel(head_size).address, rows, grain=32))


def supports_kv4_append(key: Tensor, *_: object) -> str | None:
    return _unsupported(key)


def supports_kv4_attention(query: Tensor, *_: object) -> str | None:
    return _unsupported(query)


def _unsupported(x: Tensor) -> str | None:
    if not _HAS_NUMBA:
        return "numba is not installed"
    if x.dtype not in FLOATS:
        return f"{str(x.dtype).removeprefix('torch.')} is computed by the reference"
    return f"head size {x.shape[-1]} is not a multiple of 8" if x.shape[-1] % 8 else None
