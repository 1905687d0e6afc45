"""The plainest correct attention in groups: one group after another, on any device, in any float type."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_attention(qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int) -> Tensor:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_zeros((len(qkv), qkv.shape[1] // 3), dtype=wide)
    for rows, count in _groups(members, starts, owned):
        query, key, value = _heads(qkv[rows].to(wide), heads)
        weights = (query[:, :count] @ key.mT * query.shape[2] ** -0.5).softmax(-1)
        out[rows[:count]] = (weights @ value).transpose(0, 1).flatten(1)
    return out.to(qkv.dtype)


def grouped_attention_grad(
    grad: Tensor, qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int
) -> Tensor:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    found = torch.zeros_like(qkv, dtype=wide)
    for rows, count in _groups(members, starts, owned):
        query, key, value = _heads(qkv[rows].to(wide), heads)
        query, scale = query[:, :count], query.shape[2] ** -0.5
        out = grad[rows[:count]].to(wide).unflatten(1, (heads, -1)).transpose(0, 1)
        weights = (query @ key.mT * scale).softmax(-1)
        change = out @ value.mT
        change = weights * (change - (weights * change).sum(-1, keepdim=True)) * scale
        for_query = F.pad(change @ key, (0, 0, 0, len(rows) - count))
        parts = for_query, change.mT @ query, weights.mT @ out
        found.index_add_(0, rows, torch.stack(parts, 1).permute(2, 1, 0, 3).flatten(1))
    return found.to(qkv.dtype)


def grouped_self_attention(
    x: Tensor,
    position: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    members: Tensor,
    starts: Tensor,
    owned: Tensor,
    heads: int,
    size: int,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    moved, in_addend, out_addend = (None if each is None else each.to(wide) for each in (position, in_bias, out_bias))
    qkv = project(x.to(wide), moved, in_weight.to(wide), in_addend)
    attended = grouped_attention(qkv, members, starts, owned, heads, size)
    return F.linear(attended, out_weight.to(wide), out_addend).to(x.dtype)


def project(x: Tensor, position: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Queries and keys of ``x + position``, values of ``x``: ``(N, 3 C)``."""
    if position is None:
        return F.linear(x, weight, bias)
    channels = out_channels(weight)
    biases = (None, None) if bias is None else bias.split((2 * channels, channels))
    weights = weight.split((2 * channels, channels))
    return torch.cat((F.linear(x + position, weights[0], biases[0]), F.linear(x, weights[1], biases[1])), 1)


def out_channels(weight: Tensor) -> int:
    """Of each of query, key and value."""
    return weight.shape[0] // 3


def _groups(members: Tensor, starts: Tensor, owned: Tensor) -> Iterator[tuple[Tensor, int]]:
    bounds = starts.tolist()
    for first, last, count in zip(bounds, bounds[1:], owned.tolist(), strict=False):
        if last > first:
            yield members[first:last].long(), count


def _heads(rows: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``(n, 3 C)``: query, key and value, each ``(heads, n, C / heads)``."""
    query, key, value = rows.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    return query, key, value
