"""The plainest correct version of each op: any device, any float type, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import check_slots, read_sequences
from .rows import pack_rows, unpack_rows


def kv4_append(key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_slots(slot_mapping, cache)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    block_size = cache.shape[2]
    cache[slots // block_size, :, slots % block_size] = pack_rows(key[kept], value[kept])


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
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for sequence in read_sequences(query, cache, block_tables, context_lens, query_start, key is not None):
        here = slice(sequence.first, sequence.last)
        keys, values = read_context(cache, block_tables[sequence.index], sequence.context, wide)
        if key is not None and value is not None:
            keys = torch.cat((keys, key[here].to(wide)))
            values = torch.cat((values, value[here].to(wide)))
        positions = torch.arange(sequence.offset, sequence.offset + sequence.last - sequence.first)
        allowed = visible(positions, torch.arange(len(keys)), causal, window).to(query.device)
        out[here] = attend(query[here].to(wide), keys, values, allowed, softmax_scale, softcap).to(out.dtype)
    return out


def read_context(cache: Tensor, table: Tensor, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``(context, Hkv, D)`` of one sequence."""
    blocks = table[: -(-context // cache.shape[2])].long()
    rows = cache[blocks].transpose(1, 2).flatten(0, 1)[:context]
    return unpack_rows(rows, dtype)


def visible(queries: Tensor, keys: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which key positions ``(K,)`` each query position ``(Q,)`` may see, bool ``(Q, K)``."""
    distance = queries.unsqueeze(1) - keys
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, softmax_scale: float, softcap: float | None
) -> Tensor:
    """Attention of one sequence; zeros for a query that sees no key.

    Args:
        query: ``(Q, Hq, D)``; key, value: ``(K, Hkv, D)``; allowed: bool ``(Q, K)``.
    """
    queries, heads, d = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(queries, kv_heads, heads // kv_heads, d)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key) * softmax_scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~allowed, -torch.inf)
    # Weights of a row without keys are NaN. What is not seen must not count even where it is NaN: 0 * NaN would.
    weights = torch.where(allowed.any(-1, keepdim=True), scores.softmax(-1), torch.zeros_like(scores))
    finite = value.isfinite().all(-1)
    summed = torch.einsum("hgqk,khd->qhgd", weights, torch.where(finite.unsqueeze(-1), value, 0.0))
    spoilt = (allowed.unsqueeze(-1) & ~finite).any(1)  # (Q, Hkv)
    summed = summed.masked_fill(spoilt.view(queries, kv_heads, 1, 1), torch.nan)
    return summed.reshape(queries, heads, d)
