"""The plainest correct order of the vertices of overlaps, all polygons at once, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

CORNERS, LARGEST = 8, 8  # candidates that are corners of the boxes; vertices that two rectangles can share
CLOSE = 1e-8  # apart along x and along y: the same vertex


def sort_overlap_vertices(vertices: Tensor, mask: Tensor) -> Tensor:
    count = mask.shape[-1]
    x, y = (each.reshape(-1, count) for each in vertices.unbind(-1))
    valid = mask.reshape(-1, count)
    close = [(each.unsqueeze(2) - each.unsqueeze(1)).abs() < CLOSE for each in (x, y)]
    again = (close[0] & close[1] & valid.unsqueeze(1)).tril(-1).any(2)
    single = valid & ~again
    angles = torch.atan2(y, x)
    angles = torch.where(angles < 0, angles + 2 * torch.pi, angles).nan_to_num(0)
    order = torch.where(single, angles, torch.inf).sort(dim=1, stable=True)[1]
    lengths = single.sum(1)
    order, lengths = _without_smallest(x, y, order, lengths)

    place = torch.arange(LARGEST + 1, device=x.device)
    padding = (CORNERS + valid[:, CORNERS:].logical_not().int().argmax(1)).unsqueeze(1)
    first, lengths = order[:, :1], lengths.unsqueeze(1)
    padding = torch.where(valid[:, CORNERS:].all(1, keepdim=True), first, padding)
    found = torch.where(place == lengths, first, torch.where(place < lengths, order[:, : LARGEST + 1], padding))
    found = torch.where(valid.sum(1, keepdim=True) < 3, padding, found)
    return found.to(torch.int32).reshape(*mask.shape[:-1], LARGEST + 1)


def _without_smallest(x: Tensor, y: Tensor, order: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the vertices whose triangles with both neighbours are the smallest, until no polygon has too many.

    Rounding makes several out of one where the boxes are nearly the same.
    """
    place = torch.arange(order.shape[1], device=x.device)
    for _ in range(max(0, int(lengths.max()) - LARGEST) if len(lengths) else 0):
        size = lengths.clamp(min=1).unsqueeze(1)
        before, after = order.gather(1, (place - 1) % size), order.gather(1, (place + 1) % size)
        (x0, y0), (x1, y1), (x2, y2) = ((x.gather(1, rows), y.gather(1, rows)) for rows in (before, order, after))
        triangle = ((x1 - x0) * (y2 - y1) - (y1 - y0) * (x2 - x1)).abs().nan_to_num(0)
        dropped = torch.where(place < size, triangle, torch.inf).argmin(1, keepdim=True)
        dropped = torch.where(lengths.unsqueeze(1) > LARGEST, dropped, order.shape[1])
        order = order.gather(1, (place + (place >= dropped).int()).clamp(max=order.shape[1] - 1))
        lengths = torch.where(lengths > LARGEST, lengths - 1, lengths)
    return order, lengths
