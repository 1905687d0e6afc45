"""Boxes for the tests, and what two of them share by plain clipping: one polygon cut by the lines of the other."""

import math
from fractions import Fraction

import torch


def rotated_boxes(count, seed=0, span=10.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=generator, dtype=torch.float64) * span
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 4 + 0.2
    angle = (torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.5) * 20
    return torch.cat((center, size, angle), 1).to(dtype)


def flat_boxes(count, seed=0, span=10.0, dtype=torch.float32):
    boxes = rotated_boxes(count, seed, span)
    return torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2), 1).to(dtype)


def corners_of(box):
    x, y, w, h, angle = (float(number) for number in box)
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        (x + dx * w * cos - dy * h * sin, y + dx * w * sin + dy * h * cos)
        for dx, dy in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))
    ]


def area_of(polygon):
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True)) / 2


def shared_area(first, second):
    """Of two convex polygons, counter-clockwise, in rational numbers."""
    polygon = [(Fraction(x), Fraction(y)) for x, y in first]
    edges = [(Fraction(x), Fraction(y)) for x, y in second]
    for (ax, ay), (bx, by) in zip(edges, edges[1:] + edges[:1], strict=True):
        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            sides = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in (p, q)]
            if sides[0] >= 0:
                kept.append(p)
            if sides[0] * sides[1] < 0:
                t = sides[0] / (sides[0] - sides[1])
                kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = kept
        if not polygon:
            return 0.0
    return float(area_of(polygon))


def exact_ious(a, b, mode="iou"):
    found = torch.zeros(len(a), len(b), dtype=torch.float64)
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            shared = shared_area(corners_of(first), corners_of(second))
            areas = [float(box[2]) * float(box[3]) for box in (first, second)]
            found[i, j] = {"area": shared, "iou": shared / (sum(areas) - shared), "iof": shared / areas[0]}[mode]
    return found
