"""The plainest correct version of each op: any device, any float type, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Scoring, check_slots, read_sequences
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
    scoring = Scoring(softmax_scale, causal, window, softcap)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for sequence in read_sequences(query, cache, block_tables, context_lens, query_start, key is not None):
        here = slice(sequence.first, sequence.last)
        keys, values = read_context(cache, block_tables[sequence.index], 0, sequence.context, wide)
        if key is not None and value is not None:
            keys = torch.cat((keys, key[here].to(wide)))
            values = torch.cat((values, value[here].to(wide)))
        positions = torch.arange(sequence.offset, sequence.offset + sequence.last - sequence.first)
        allowed = scoring.mask(positions, torch.arange(len(keys))).to(query.device)
        out[here] = attend(query[here].to(wide), keys, values, allowed, scoring)[0].to(out.dtype)
    return out


def read_context(cache: Tensor, table: Tensor, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``(last - first, Hkv, D)`` of some of a sequence's tokens."""
    tokens = torch.arange(first, last, device=cache.device)
    block_size = cache.shape[2]
    rows = cache[table[tokens // block_size].long(), :, tokens % block_size]
    return unpack_rows(rows, dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, and the logarithm of what its softmax was divided by.

    Args:
        query: ``(Q, Hq, D)``; key, value: ``(K, Hkv, D)``; allowed: bool ``(Q, K)``.

    Returns:
        ``(Q, Hq, D)`` and ``(Q, Hq)``: zeros and -inf for a query that sees no key.
    """
    queries, heads, d = query.shape
    kv_heads = key.shape[1]
    key, value = mark_rows(key, value)
    grouped = query.reshape(queries, kv_heads, heads // kv_heads, d)
    scores = torch.einsum("qhgd,khd->qhgk", grouped, key) * scoring.softmax_scale
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)
    total = scores.logsumexp(-1)
    weights = (scores - total.unsqueeze(-1)).exp()
    weights = weights.masked_fill(~allowed.any(-1)[:, None, None, None], 0.0)  # (-inf) - (-inf) else
    out = torch.einsum("qhgk,khd->qhgd", weights, value)
    return out.reshape(queries, heads, d), total.reshape(queries, heads)


def mark_rows(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(..., D)`` where those with a value that is not finite have a key of NaN and values of 0.

    Their scores are NaN then for who sees them, and for who does not, a weight of 0 is not multiplied with NaN.
    """
    bad = ~value.isfinite().all(-1, keepdim=True)
    return key.masked_fill(bad, torch.nan), value.masked_fill(bad, 0.0)
