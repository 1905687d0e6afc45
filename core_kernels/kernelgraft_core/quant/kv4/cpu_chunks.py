"""Many queries of one sequence on a CPU: matrix products with cached tokens, dequantized piece by piece.

The queries' own tokens and each piece of the context are attended to by themselves, and put together by their
log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Scoring, Sequence
from .reference import attend, mark_rows, read_context

PIECE = 2048  # cached tokens that are dequantized at a time
QUERIES = 256  # queries at a time where scores are written to memory


class _Sum:
    """Attention over several sets of keys, put together."""

    def __init__(self, shape: torch.Size) -> None:
        self.out, self.total = torch.zeros(shape), torch.full(shape[:-1], -torch.inf)

    def add(self, out: Tensor, total: Tensor, first: int = 0) -> None:
        """Attention ``(Q, Hq, D)`` of the queries from ``first`` on, and its log-sum-exp ``(Q, Hq)``."""
        here = slice(first, first + len(out))
        joint = torch.logaddexp(self.total[here], total)
        for part, of in ((self.out[here], self.total[here]), (out, total)):
            # Nothing was seen where the exponent would be inf - inf.
            part.mul_((of - joint).exp().masked_fill(of == -torch.inf, 0.0).unsqueeze(-1))
        self.out[here] += out
        self.total[here] = joint


def attend_chunk(
    query: Tensor,
    own: tuple[Tensor, Tensor] | None,
    cache: Tensor,
    table: Tensor,
    sequence: Sequence,
    scoring: Scoring,
) -> Tensor:
    """Attention of one sequence ``(Q, Hq, D)``.

    Args:
        query: ``(Q, Hq, D)``; own: keys and values ``(Q, Hkv, D)`` of the same tokens, None where the cache has them.
        table: the sequence's row of the block table.
    """
    plain = scoring.window is None and scoring.softcap is None
    context = sequence.context
    if own is None and scoring.causal:  # what the queries do not see all of
        context = sequence.offset
        own = read_context(cache, table, context, sequence.context, query.dtype)
    summed = _Sum(query.shape)
    if own is not None:
        key, value = own
        if plain:
            summed.add(*_flash(query, *mark_rows(key, value), scoring))
        else:
            _add_masked(summed, query, key, value, sequence.offset, sequence.offset, scoring)
    first, _ = scoring.sees(sequence.offset, context)
    _, last = scoring.sees(sequence.offset + len(query) - 1, context)
    for start in range(first, last, PIECE):
        key, value = read_context(cache, table, start, min(start + PIECE, last), torch.float32)
        if plain:
            key, value = (x.to(query.dtype) for x in mark_rows(key, value))
            summed.add(*_flash_grouped(query, key, value, scoring))
        else:
            _add_masked(summed, query, key, value, sequence.offset, start, scoring)
    return summed.out.to(query.dtype)


def _flash(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Queries and keys of the same tokens."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return _run_flash(query, key, value, scoring.causal, scoring.softmax_scale)


def _flash_grouped(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Every query sees every key: the queries that share a head are one longer sequence of them."""
    (queries, heads, d), kv_heads = query.shape, key.shape[1]
    folded = query.reshape(queries, kv_heads, heads // kv_heads, d).transpose(1, 2).reshape(-1, kv_heads, d)
    out, total = _run_flash(folded, key, value, False, scoring.softmax_scale)
    out = out.view(queries, -1, kv_heads, d).transpose(1, 2).reshape(query.shape)
    return out, total.reshape(queries, -1, kv_heads).transpose(1, 2).reshape(queries, heads)


def _run_flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's attention, which gives its log-sum-exp too: all ``(tokens, heads, ...)``, the results float32."""
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, dropout_p=0.0, is_causal=causal, scale=scale
    )
    return out[0].transpose(0, 1).float(), total[0].transpose(0, 1).float()


def _add_masked(
    summed: _Sum, query: Tensor, key: Tensor, value: Tensor, query_at: int, key_at: int, scoring: Scoring
) -> None:
    """Add attention over keys at positions ``key_at`` and on, for queries at ``query_at`` and on."""
    key, value, positions = key.float(), value.float(), torch.arange(key_at, key_at + len(key))
    for first in range(0, len(query), QUERIES):
        part = query[first : first + QUERIES].float()
        allowed = scoring.mask(torch.arange(query_at + first, query_at + first + len(part)), positions)
        if allowed.any():
            summed.add(*attend(part, key, value, allowed, scoring), first)
