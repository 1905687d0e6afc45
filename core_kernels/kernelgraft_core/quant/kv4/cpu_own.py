"""The queries' own keys and values on a CPU, where there are many: PyTorch's attention with its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Scoring
from .reference import attend, mark_rows

QUERIES = 256  # at a time, where scores are written to memory


def attend_own(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention of one sequence's queries ``(Q, Hq, D)`` over keys and values ``(Q, Hkv, D)`` of the same tokens.

    Returns:
        ``(Q, Hq, D)``, and the logarithm of what its softmax was divided by, ``(Q, Hq)``.
    """
    if scoring.window is None and scoring.softcap is None:
        return _flash(query, *mark_rows(key, value), scoring)
    parts = []
    for first in range(0, len(query), QUERIES):
        last = min(first + QUERIES, len(query))
        low, _ = scoring.sees(first, len(query))
        _, high = scoring.sees(last - 1, len(query))
        allowed = scoring.mask(torch.arange(first, last), torch.arange(low, high))
        seen = slice(low, high)
        parts.append(attend(query[first:last].float(), key[seen].float(), value[seen].float(), allowed, scoring))
    out, total = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(total)


def _flash(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, dropout_p=0.0, is_causal=scoring.causal, scale=scoring.softmax_scale
    )
    return out[0].transpose(0, 1), total[0].transpose(0, 1)
