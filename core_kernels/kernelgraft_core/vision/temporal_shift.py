"""Temporal interlacing (TIN, arXiv 2001.06499): groups of channels moved along time."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_shift(x: Tensor, shift: Tensor) -> Tensor:
    """Each group of channels moved by a number of frames of its own, zero where nothing comes from.

    Args:
        x: ``(N, T, C, ...)``.
        shift: integers ``(N, G)``: frame ``t`` of group ``g`` becomes frame ``t + shift[n, g]``. C is a multiple of G.

    Returns:
        As ``x``. Differentiable in ``x``; the gradient is moved back, by the negative shift.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    if x.dim() < 3 or shift.dim() != 2 or shift.shape[0] != x.shape[0] or shift.device != x.device:
        raise ValueError(f"x is {tuple(x.shape)} on {x.device}, shift {tuple(shift.shape)} on {shift.device}")
    if shift.is_floating_point() or shift.shape[1] < 1 or x.shape[2] % shift.shape[1]:
        raise ValueError(
            f"shift is {shift.dtype} {tuple(shift.shape)}, expected integers (N, G), G a divisor of {x.shape[2]}"
        )
    frames, groups = x.shape[1], shift.shape[1]
    source = torch.arange(frames, device=x.device).view(1, -1, 1) - shift.long().unsqueeze(1)
    there = (source >= 0) & (source < frames)
    split = x.unflatten(2, (groups, x.shape[2] // groups))
    wanted = source.clamp(0, max(0, frames - 1))
    index, mask = (each.view(*each.shape, *(1,) * (split.dim() - 3)) for each in (wanted, there))
    return torch.where(mask, split.gather(1, index.expand_as(split)), 0).flatten(2, 3)
