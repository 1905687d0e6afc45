"""Attention in groups by torch alone: groups padded to one size, and all of them at once. Any device.

Nothing here waits for a number of a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import project


def grouped_attention(qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int) -> Tensor:
    if not qkv.numel():
        return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))
    rows, there, is_own = table(members, starts, owned, size)
    query, key, value = _heads(qkv[rows], heads)
    # A group without members attends to everything: a mask of nothing at all would give NaN, and nobody reads it.
    mask = (there | ~there[:, :1]).view(len(rows), 1, 1, size)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out = _scattered(attended.transpose(1, 2).flatten(2), rows, is_own, len(qkv))
    return out[:-1]


def grouped_attention_grad(
    grad: Tensor, qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int
) -> Tensor:
    if not qkv.numel():
        return torch.zeros_like(qkv)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    rows, there, is_own = table(members, starts, owned, size)
    query, key, value = _heads(qkv[rows].to(wide), heads)
    out = torch.where(is_own.unsqueeze(2), grad[rows], 0).to(wide)
    out = out.unflatten(2, (heads, -1)).transpose(1, 2)
    mask, scale = there.view(len(rows), 1, 1, size), query.shape[3] ** -0.5
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    weights = torch.where(mask, scores.softmax(-1), 0)  # NaN in groups without members, else 0 already
    change = out @ value.mT
    change = weights * (change - (weights * change).sum(-1, keepdim=True)) * scale
    parts = change @ key, change.mT @ query, weights.mT @ out
    each = torch.stack(parts, 2).permute(0, 3, 2, 1, 4).flatten(2)  # (g, size, 3 C)
    found = _scattered(each, rows, is_own, len(qkv))
    if len(members) != len(qkv):  # some are borrowed: their gradients are added
        borrowed = torch.where(there & ~is_own, rows, len(qkv))
        found = found.index_put((borrowed,), each, accumulate=True)
    return found[:-1].to(qkv.dtype)


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
    from .ops import ATTENTION

    qkv = project(x, position, in_weight, in_bias)
    return F.linear(ATTENTION(qkv, members, starts, owned, heads, size), out_weight, out_bias)


def table(members: Tensor, starts: Tensor, owned: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups padded to one size: rows int64 ``(g, size)``, which of them are there, and which are the group's own."""
    place = torch.arange(size, device=members.device)
    there = place < starts.diff().unsqueeze(1)
    # Places behind a group repeat its last member: what another group holds, NaN perhaps, is not to come near it.
    at = torch.minimum(starts[:-1].unsqueeze(1) + place, starts[1:].unsqueeze(1) - 1).clamp(0, len(members) - 1)
    return members[at].long(), there, place < owned.unsqueeze(1)


def _heads(rows: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``(g, n, 3 C)``: query, key and value, each ``(g, heads, n, C / heads)``."""
    query, key, value = rows.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def _scattered(each: Tensor, rows: Tensor, is_own: Tensor, count: int) -> Tensor:
    """Values of the groups' own members, back in their rows ``(count + 1, C)``; the last row is where others go."""
    out = each.new_zeros((count + 1, each.shape[2]))
    return out.index_copy_(0, torch.where(is_own, rows, count).flatten(), each.flatten(0, 1))
