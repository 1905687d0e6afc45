"""Rotated boxes and quadrilaterals as one thing: a centre and four corners around it, counter-clockwise.

Outlines are float64 ``(13, N)``, a row for each quantity, so that a kernel reads one quantity of neighbouring boxes
from neighbouring places. Corners are relative to the centre: two boxes far from the origin are as exact as two at it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of outlines: centre, half of the extent along x and y, area, corners.
CENTER_X, CENTER_Y, HALF_X, HALF_Y, AREA, CORNER_X, CORNER_Y = 0, 1, 2, 3, 4, 5, 9
ROWS = 13


def rotated_outlines(boxes: Tensor) -> Tensor:
    """Outlines of boxes ``(N, 5)``: centre x, centre y, width, height, angle in radians from x towards y.

    A box with a negative width or height, or NaN, has an area that is not positive and overlaps nothing.
    """
    x, y, width, height, angle = boxes.double().unbind(1)
    cos, sin = angle.cos(), angle.sin()
    along = torch.stack((width, -width, -width, width)) / 2
    across = torch.stack((height, height, -height, -height)) / 2
    return _outlines(x, y, width * height, along * cos - across * sin, along * sin + across * cos)


def quad_outlines(quads: Tensor) -> Tensor:
    """Outlines of convex quadrilaterals ``(N, 8)``: x and y of four corners, either way around."""
    corners = quads.double().unflatten(1, (4, 2))
    center = corners.mean(1)
    x, y = (corners - center.unsqueeze(1)).unbind(2)
    area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2
    turned = (area < 0).unsqueeze(1)
    x, y = (torch.where(turned, each.flip(1), each).T for each in (x, y))
    return _outlines(center[:, 0], center[:, 1], area.abs(), x, y)


def _outlines(x: Tensor, y: Tensor, area: Tensor, corners_x: Tensor, corners_y: Tensor) -> Tensor:
    halves = [each.abs().amax(0) for each in (corners_x, corners_y)]
    return torch.cat((torch.stack((x, y, *halves, area)), corners_x, corners_y))
