"""Public ops of the 4-bit key-value cache: checked here once, run by the best backend at hand. No gradients."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference
from .rows import SCALE_BYTES

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _without_triton(*_: Any) -> str:
    return "Triton is not installed"


APPEND = Op("kv4_append(Tensor key, Tensor value, Tensor(a!) cache, Tensor slot_mapping) -> ()", fake=lambda *_: None)
ATTENTION = Op(
    "kv4_attention(Tensor query, Tensor? key, Tensor? value, Tensor cache, Tensor block_tables, Tensor context_lens, "
    "Tensor query_start, float softmax_scale, bool causal, int? window, float? softcap) -> Tensor",
    fake=lambda query, *_: query.new_empty(query.shape),
)
for _op in (APPEND, ATTENTION):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    for _backend, _device, _present in (("cpu", "cpu", True), ("triton", "cuda", _HAS_TRITON)):
        _module = f"{__package__}.{_backend}"
        _supports = deferred(_module, f"supports_{_op.name}") if _present else _without_triton
        _op.register(Implementation(_backend, deferred(_module, _op.name), (_device,), 10, _supports))


def kv4_append(key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Quantize keys and values to 4 bits and store them (KV4 of QServe, arXiv 2405.04532).

    Args:
        key, value: ``(T, Hkv, D)`` float16, bfloat16, float32 or float64, any strides; D even. A row of them that
            holds NaN or infinity is stored as NaN; values beyond float16's range are cut off at its ends.
        cache: uint8 ``(blocks, Hkv, block size, D + 8)``, see :mod:`kernelgraft_core.quant.kv4.rows`, changed in
            place. Rows must be contiguous, other strides are free.
        slot_mapping: int64 or int32 ``(T,)``: token ``t`` goes to block ``slot // block size``, row
            ``slot % block size``. Tokens with a negative slot are skipped. Slots must differ.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or, on a CPU, a slot is beyond the cache; nothing is
            stored then. On a GPU such tokens are skipped.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    heads, head_size = _check_cache(cache)
    tokens = key.shape[0] if key.dim() else 0
    for name, tensor in (("key", key), ("value", value)):
        _check_floats(name, tensor, (tokens, heads, head_size), key.dtype, cache)
    _check_integers("slot_mapping", slot_mapping, (tokens,), cache)
    APPEND(key, value, cache, slot_mapping)


def kv4_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a batch of sequences over a 4-bit cache and, unquantized, over the queries' own tokens.

    Sequence ``b`` has the queries ``query_start[b]`` to ``query_start[b + 1] - 1``. Its first ``context_lens[b]``
    tokens are in the cache; the keys and values of the queries follow them. Without ``key`` those are in the cache
    too: ``context_lens`` counts them, and they are its last tokens.

    Args:
        query: ``(T, Hq, D)`` float16, bfloat16, float32 or float64, any strides; D even, Hq a multiple of Hkv.
        key, value: ``(T, Hkv, D)`` of the dtype of ``query``, or both None.
        cache: as :func:`kv4_append` fills it, uint8 ``(blocks, Hkv, block size, D + 8)``.
        block_tables: int32 or int64 ``(B, most blocks of a sequence)``: which block holds tokens
            ``i * block size`` and on. Entries beyond a sequence's context are not read.
        context_lens: int32 or int64 ``(B,)``.
        query_start: int32 or int64 ``(B + 1,)``, ascending from 0. Queries from its last entry on give zeros.
        softmax_scale: what ``query @ key`` is multiplied with, most often ``D ** -0.5``.
        causal: a query sees no later tokens.
        window: a query sees tokens at distances below it, itself included; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None for none.

    Returns:
        ``(T, Hq, D)`` of the dtype of ``query``, contiguous. A query that sees no key gives zeros; one that sees a row
        that is not finite gives NaN or infinity. Sums are float32, or float64 for float64 queries.

    Raises:
        ValueError: a shape, dtype, stride, device or number is wrong; on a CPU also where lengths, block table or
            query_start lead outside the queries or the cache. On a GPU such values are not looked for: a block
            outside the cache reads whatever memory is there.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    heads, head_size = _check_cache(cache)
    if query.dim() != 3 or query.shape[1] % max(heads, 1) or query.shape[1] == 0:
        raise ValueError(f"query is {tuple(query.shape)}, expected (T, a multiple of {heads}, {head_size})")
    _check_floats("query", query, (query.shape[0], query.shape[1], head_size), query.dtype, cache)
    if (key is None) != (value is None):
        raise ValueError(f"key is {_kind(key)} and value {_kind(value)}, expected both or neither")
    for name, tensor in (("key", key), ("value", value)):
        if tensor is not None:
            _check_floats(name, tensor, (query.shape[0], heads, head_size), query.dtype, cache)
    if block_tables.dim() != 2:
        raise ValueError(f"block_tables is {tuple(block_tables.shape)}, expected (B, blocks)")
    batch = block_tables.shape[0]
    _check_integers("block_tables", block_tables, tuple(block_tables.shape), cache)
    _check_integers("context_lens", context_lens, (batch,), cache)
    _check_integers("query_start", query_start, (batch + 1,), cache)
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale is {softmax_scale}, expected a finite number")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1 or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, expected a positive number or None")
    out: Tensor = ATTENTION(
        query, key, value, cache, block_tables, context_lens, query_start, softmax_scale, causal, window, softcap
    )
    return out


def _check_cache(cache: Tensor) -> tuple[int, int]:
    """Key-value heads and head size."""
    if cache.dtype != torch.uint8 or cache.dim() != 4:
        raise ValueError(
            f"cache is {cache.dtype} {tuple(cache.shape)}, expected torch.uint8 (blocks, Hkv, block size, D + 8)"
        )
    _, heads, block_size, row = cache.shape
    if row <= SCALE_BYTES or row % 2 or heads == 0 or block_size == 0:
        raise ValueError(f"cache is {tuple(cache.shape)}, expected (blocks, Hkv, block size, D + 8) with an even D")
    if cache.stride(3) != 1:
        raise ValueError(f"cache has strides {cache.stride()}, expected rows to be contiguous")
    return heads, row - SCALE_BYTES


def _check_floats(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, cache: Tensor) -> None:
    if x.dtype not in FLOATS or x.dtype != dtype or x.shape != shape:
        wanted = dtype if dtype in FLOATS else f"one of {FLOATS}"
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected {wanted} {shape}")
    _check_device(name, x, cache)


def _check_integers(name: str, x: Tensor, shape: tuple[int, ...], cache: Tensor) -> None:
    if x.dtype not in INTEGERS or x.shape != shape:
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected torch.int32 or torch.int64 {shape}")
    _check_device(name, x, cache)


def _check_device(name: str, x: Tensor, cache: Tensor) -> None:
    if x.device != cache.device:
        raise ValueError(f"{name} is on {x.device}, the cache on {cache.device}")


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)}"
