"""The ops of the 4-bit cache on a CPU: compiled kernels that read the cache as it is.

Many queries that bring their own keys attend to those by PyTorch's attention (:mod:`.cpu_own`), and to the cache by the
same kernels as single ones: with 16-bit integer products these are faster than dequantizing for a matrix product.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase, parallel_for

from .batch import LOG2E, Scoring, check_slots, read_sequences
from .cpu_own import attend_own
from .cpu_work import Work, cut_work

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def kv4_append(key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_slots(slot_mapping, cache)
    tokens, heads, head_size = key.shape
    if tokens == 0:
        return
    launch = _append_launch(tokens * heads, head_size)
    key, value, slots = key.float().contiguous(), value.float().contiguous(), slot_mapping.long().contiguous()
    launch(*_numbers(cache), key.data_ptr(), value.data_ptr(), slots.data_ptr())


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
    _, heads, head_size = query.shape
    kv_heads = cache.shape[1]
    if not sequences:
        return torch.zeros(query.shape, dtype=query.dtype)
    work = cut_work(sequences, heads, kv_heads, scoring, key is not None)
    queries = query.float().contiguous()
    own = [None if x is None else x.float().contiguous() for x in (key, value)]
    tables = block_tables.int().contiguous()
    partial, out = torch.empty(work.rows, head_size + 2), torch.zeros(query.shape)
    if key is not None and value is not None:
        _attend_own(query, key, value, partial, work, scoring)
    factors = torch.tensor(scoring.factors)
    numbers = (
        0, *_numbers(cache), queries.data_ptr(), *(0 if x is None else x.data_ptr() for x in own), heads // kv_heads,
        tables.data_ptr(), tables.shape[1], work.parts.ctypes.data, work.tokens.ctypes.data, factors.data_ptr(),
        int(causal), window or 0, partial.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    told = (ctypes.c_int64 * len(numbers))(*numbers)
    attend, merge = _attention_kernels(head_size)
    if len(work.parts):
        parallel_for(attend, told, len(work.parts) * kv_heads, bounds=work.bounds)
    parallel_for(merge, told, len(work.tokens) * heads, grain=8)
    return out.to(query.dtype)


def _attend_own(query: Tensor, key: Tensor, value: Tensor, partial: Tensor, work: Work, scoring: Scoring) -> None:
    """Write attention of long sequences over their own tokens to the partial results that are kept for it."""
    for sequence, rows in work.own:
        here = slice(sequence.first, sequence.last)
        out, total = (x.float() for x in attend_own(query[here], key[here], value[here], scoring))
        scores = torch.stack((total * LOG2E, torch.ones_like(total)), -1)
        for block, row in zip(torch.cat((out, scores), -1).split(work.block), rows, strict=True):
            partial[row : row + block.shape[0] * block.shape[1]] = block.flatten(0, 1)


def _numbers(cache: Tensor) -> tuple[int, ...]:
    """Address, strides in bytes, block size and heads, as kernels are told."""
    return cache.data_ptr(), *cache.stride()[:3], cache.shape[2], cache.shape[1]


@functools.lru_cache(maxsize=1024)
def _append_launch(rows: int, head_size: int) -> Launch:
    from .cpu_kernels import append_kernel  # compiles, or loads what an earlier process compiled

    return Launch(Phase(append_kernel(head_size).address, rows, grain=32))


@functools.cache
def _attention_kernels(head_size: int) -> tuple[int, int]:
    from kernelgraft_core.runtime.cpu_vectors import instruction_set

    from .cpu_kernels import attend_kernel, merge_kernel

    return attend_kernel(instruction_set(), head_size).address, merge_kernel(head_size).address


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
