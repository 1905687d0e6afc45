"""The ops of the 4-bit cache on a GPU. Nothing is read back from it: sizes that lengths decide are bounded instead."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .batch import Scoring
from .triton_kernels import append_kernel, cached_kernel, merge_kernel, own_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALVES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
PROGRAMS = 4  # for each multiprocessor, that splitting a context aims at
LEAST_SPLIT = 256  # tokens
MOST_SPLITS = 32


@dataclass(frozen=True)
class Tile:
    """A tile of attention.

    Attributes:
        rows: queries, in all heads that share keys.
        tokens: whose keys and values are loaded together.
        warps, stages: of a program, and of loading.
        registers: allowed per thread, 0 for what ptxas chooses; given where it would spill to fit one more program.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def launch(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers or None}


def choose_cached_tile(group: int, head_size: int, is_decode: bool) -> Tile:
    """The tile of ``cached_kernel`` for ``group`` query heads to a key-value head; decode is one query to a sequence.

    Chosen by what ahead-of-time compiling shows: no spills, tiles in flight, and the fewest instructions per token.
    """
    rows = max(16 if is_decode else 32, triton.next_power_of_2(group))
    if rows == 16:
        return Tile(16, 64, 2 if head_size <= 128 else 4, 5)
    warps = 4 if rows == 32 and head_size <= 128 else 8
    return Tile(rows, 64 if head_size <= 64 else 32, warps, 5, 255)


def choose_own_tile(group: int, head_size: int, is_decode: bool) -> Tile:
    """The tile of ``own_kernel``, likewise."""
    rows = max(16 if is_decode else 64, triton.next_power_of_2(group))
    if rows < 64:
        return Tile(rows, 32, 4, 3, 128 if head_size <= 64 else 240)
    return Tile(rows, 64 if head_size <= 64 else 32, 4 if head_size <= 128 else 8, 2, 240)


def kv4_append(key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    tokens, heads, head_size = key.shape
    if tokens == 0:
        return
    key, value = _rows_contiguous(key), _rows_contiguous(value)
    words = cache.view(torch.int32)
    with torch.cuda.device_of(cache):
        append_kernel[tokens, heads](
            key, value, words, slot_mapping.contiguous(), cache.shape[0] * cache.shape[2],
            *key.stride()[:2], *value.stride()[:2], *words.stride()[:3], cache.shape[2],
            D=head_size, BD=triton.next_power_of_2(head_size), num_warps=1,
        )  # fmt: skip


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
    tokens, heads, head_size = query.shape
    batch, kv_heads = block_tables.shape[0], cache.shape[1]
    out = query.new_empty(query.shape)
    if tokens == 0:
        return out
    if batch == 0:
        return out.zero_()
    query = _rows_contiguous(query)
    tables, lengths, starts = (x.int().contiguous() for x in (block_tables, context_lens, query_start))
    group, is_decode = heads // kv_heads, tokens <= batch
    tile = choose_cached_tile(group, head_size, is_decode)
    blocks = _blocks(tokens, batch, tile, group)
    splits = choose_splits(tables.shape[1] * cache.shape[2], min(blocks, tokens) * kv_heads, _processors(cache.device))
    slots = splits + (key is not None)
    sums = torch.empty((slots, tokens, heads, head_size), dtype=torch.float32, device=query.device)
    state = torch.empty((slots, tokens, heads, 2), dtype=torch.float32, device=query.device)
    factor, cap = Scoring(softmax_scale, causal, window, softcap).factors
    masks = causal, window, softcap
    words = cache.view(torch.int64)
    with torch.cuda.device_of(query):
        cached_kernel[blocks, kv_heads, splits](
            query, words, tables, lengths, starts, sums, state, tokens, batch, heads, tables.shape[1],
            *query.stride()[:2], *words.stride()[:3], factor, cap, window or 0,
            **constants(group, head_size, tile, *masks), BLOCK_SIZE=cache.shape[2], SPLITS=splits,
            HAS_OWN=key is not None, **tile.launch,
        )  # fmt: skip
        if key is not None and value is not None:
            key, value = _rows_contiguous(key), _rows_contiguous(value)
            tile = choose_own_tile(group, head_size, is_decode)
            own_kernel[_blocks(tokens, batch, tile, group), kv_heads](
                query, key, value, starts, sums, state, tokens, batch, heads, splits,
                *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], factor, cap, window or 0,
                **constants(group, head_size, tile, *masks), INTERPRETED=INTERPRETED,
                **tile.launch,
            )  # fmt: skip
        merge_kernel[tokens, heads](
            sums, state, starts, out, tokens, batch, heads,
            D=head_size, BD=triton.next_power_of_2(head_size), SLOTS=slots, num_warps=1,
        )  # fmt: skip
    return out


def constants(
    group: int, head_size: int, tile: Tile, causal: bool, window: int | None, softcap: float | None
) -> dict[str, int | bool]:
    """The constant arguments that both attention kernels take."""
    return {
        "D": head_size, "BD": triton.next_power_of_2(head_size), "BM": tile.rows, "BN": tile.tokens, "GROUP": group,
        "BQ": tile.rows // group, "CAUSAL": causal, "HAS_WINDOW": window is not None, "HAS_CAP": softcap is not None,
        "STAGES": tile.stages,
    }  # fmt: skip


def _blocks(tokens: int, batch: int, tile: Tile, group: int) -> int:
    """Blocks of queries that are enough however many of them each sequence has."""
    return tokens // (tile.rows // group) + batch


def choose_splits(longest: int, programs: int, processors: int) -> int:
    """How many programs share a context of up to ``longest`` tokens, where there are ``programs`` without sharing."""
    wanted = -(-PROGRAMS * processors // max(programs, 1))
    return max(1, min(wanted, -(-longest // LEAST_SPLIT), MOST_SPLITS))


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports_kv4_append(key: Tensor, value: Tensor, cache: Tensor, *_: object) -> str | None:
    return _unsupported(key, cache, (*HALVES, torch.float32), 8)


def supports_kv4_attention(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, *_: object) -> str | None:
    return _unsupported(query, cache, HALVES, 16)


def _unsupported(x: Tensor, cache: Tensor, dtypes: tuple[torch.dtype, ...], multiple: int) -> str | None:
    head_size = x.shape[-1]
    if x.dtype not in dtypes:
        return f"{x.dtype} is not one of {', '.join(map(str, dtypes))}"
    if head_size % multiple or head_size > LARGEST_HEAD:
        return f"head size {head_size} is not a multiple of {multiple} up to {LARGEST_HEAD}"
    if any(stride % 8 for stride in cache.stride()[:3]) or cache.data_ptr() % 8:
        return f"rows of the cache, with strides {cache.stride()}, do not begin at multiples of 8 bytes"
    if cache.device.type == "cuda" and torch.cuda.get_device_capability(cache.device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(cache.device)} is below 8.0"
    return None
