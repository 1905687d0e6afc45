"""The plainest correct overlap of boxes, on any device.

Two convex outlines: the outline of what they share consists of the parts of each one's edges that lie inside the other,
and its area is half the sum of ``cross(begin, end)`` over these parts. Nothing has to be sorted. Where an edge of one
crosses an edge of the other is computed once and cuts both, so that errors of rounding cannot tear the outline open:
nearly parallel edges, which leave that place open, then cost no more than others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.boxes.outlines import AREA, CENTER_X, CORNER_X, CORNER_Y

AREA_OF_OVERLAP, IOU, IOF = range(3)
CHUNK = 1 << 15  # pairs at a time: some 100 MB


def box_iou(a: Tensor, b: Tensor, mode: int, aligned: bool, offset: float) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    first, second = a.to(wide), b.to(wide)
    if not aligned:
        first = first.unsqueeze(1)
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low + offset).clamp(min=0).prod(-1)
    areas = [(each[..., 2:] - each[..., :2] + offset).prod(-1) for each in (first, second)]
    base = areas[0] + areas[1] - shared if mode == IOU else areas[0]
    return ratio(shared, base).to(a.dtype)


def outline_overlap(a: Tensor, b: Tensor, mode: int, aligned: bool, dtype: torch.dtype) -> Tensor:
    if aligned:
        return torch.cat([_overlap(*pair, mode) for pair in zip(a.split(CHUNK, 1), b.split(CHUNK, 1), strict=True)]).to(
            dtype
        )
    rows = max(1, CHUNK // max(1, b.shape[1]))
    found = torch.empty((a.shape[1], b.shape[1]), dtype=dtype, device=a.device)
    for some, out in zip(a.split(rows, 1), found.split(rows), strict=True):
        out.copy_(_overlap(some.unsqueeze(2), b.unsqueeze(1), mode))
    return found


def ratio(shared: Tensor, base: Tensor) -> Tensor:
    """0 where there is nothing to divide by."""
    sound = (base > 0) & base.isfinite()
    return torch.where(sound, shared / torch.where(sound, base, 1), 0)


def _overlap(a: Tensor, b: Tensor, mode: int) -> Tensor:
    """Of outlines ``(13, ...)`` that broadcast."""
    areas = a[AREA], b[AREA]
    # Relative to the centre of the smaller one, within which all that is shared lies.
    away = torch.where(areas[0] <= areas[1], 1.0, 0.0)
    between = b[CENTER_X : CENTER_X + 2] - a[CENTER_X : CENTER_X + 2]
    ax, bx = _corners(a, CORNER_X, between[0] * (away - 1)), _corners(b, CORNER_X, between[0] * away)
    ay, by = _corners(a, CORNER_Y, between[1] * (away - 1)), _corners(b, CORNER_Y, between[1] * away)
    shared = _shared_area(ax, ay, bx, by)
    sound = (areas[0] > 0) & (areas[1] > 0) & (shared > 0)
    shared = torch.where(sound, torch.minimum(shared, torch.minimum(*areas)), 0)
    if mode == AREA_OF_OVERLAP:
        return shared
    return ratio(shared, areas[0] + areas[1] - shared if mode == IOU else areas[0].expand_as(shared))


def _corners(outlines: Tensor, first: int, shift: Tensor) -> Tensor:
    return outlines[first : first + 4] + shift


def _shared_area(ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor) -> Tensor:
    """Corners are ``(4, ...)``; edges of ``a`` go along the first dimension, those of ``b`` along the second."""
    a_along = [each.roll(-1, 0) - each for each in (ax, ay)]
    b_along = [each.roll(-1, 0) - each for each in (bx, by)]
    dx, dy = (each.unsqueeze(1) for each in a_along)
    ex, ey = (each.unsqueeze(0) for each in b_along)
    px, py = ax.unsqueeze(1) - bx.unsqueeze(0), ay.unsqueeze(1) - by.unsqueeze(0)
    beside, turn = ex * py - ey * px, ex * dy - ey * dx
    with_it = dx * ex + dy * ey
    t = -beside / turn
    u = (px * ex + py * ey + t * with_it) / (ex * ex + ey * ey)
    # Parallel edges do not cross: one of the two is inside of the other, or, back to back, both or neither.
    same, opposed = (turn == 0) & (with_it > 0), (turn == 0) & (with_it < 0)
    a_out = (same & (beside < 0)) | (opposed & (beside <= 0))
    b_out = (same & (beside >= 0)) | (opposed & (beside <= 0))
    enters, leaves = turn > 0, turn < 0  # a, what b bounds
    t_low, t_high = _cut(t, enters, leaves, a_out, 1)
    u_low, u_high = _cut(u, leaves, enters, b_out, 0)
    twice = ((t_high - t_low).clamp(min=0) * (ax * a_along[1] - ay * a_along[0])).sum(0)
    return (twice + ((u_high - u_low).clamp(min=0) * (bx * b_along[1] - by * b_along[0])).sum(0)) / 2


def _cut(at: Tensor, enters: Tensor, leaves: Tensor, out: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    low = torch.where(enters, at, 0).amax(dim).clamp(min=0)
    high = torch.where(out, -1, torch.where(leaves, at, 1)).amin(dim).clamp(max=1)
    return low, high
