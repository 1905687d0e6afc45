"""The plainest correct suppression of boxes, one kept box after another, on any device.

Boxes come in the order of their scores, the highest first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernelgraft_core.boxes.overlap import reference as overlap

NAIVE, LINEAR, GAUSSIAN = range(3)


def nms_boxes(boxes: Tensor, labels: Tensor | None, threshold: float, inclusive: bool, offset: float) -> Tensor:
    limit = limit_of(threshold, boxes.dtype, inclusive)
    return _kept(_winners(len(boxes), _box_ious(boxes, offset), labels, limit, boxes.device))


def nms_outlines(outlines: Tensor, labels: Tensor | None, threshold: float, inclusive: bool, single: bool) -> Tensor:
    dtype = torch.float32 if single else torch.float64

    def ious(i: int) -> Tensor:
        return overlap.outline_overlap(outlines[:, i : i + 1], outlines[:, i + 1 :], overlap.IOU, False, dtype)[0]

    return _kept(_winners(outlines.shape[1], ious, labels, limit_of(threshold, dtype, inclusive), outlines.device))


def nms_match(boxes: Tensor, threshold: float) -> Tensor:
    return _winners(len(boxes), _box_ious(boxes, 0), None, limit_of(threshold, boxes.dtype, True), boxes.device)


def soft_nms(
    boxes: Tensor, scores: Tensor, threshold: float, sigma: float, min_score: float, method: int, offset: float
) -> tuple[Tensor, Tensor]:
    threshold, min_score = (limit_of(number, boxes.dtype) for number in (threshold, min_score))
    rows = torch.arange(len(boxes), device=boxes.device)
    left, at = len(boxes), 0
    scores = scores.clone()
    while at < left:
        best = at + int(scores[rows[at:left]].argmax())
        rows[[at, best]] = rows[[best, at]]
        first, rest = rows[at], rows[at + 1 : left]
        ious = overlap.box_iou(boxes[first].unsqueeze(0), boxes[rest], overlap.IOU, False, offset)[0]
        if method == GAUSSIAN:
            weights = (-(ious * ious) / sigma).exp()
        else:
            weights = torch.where(ious >= threshold, 1 - ious if method == LINEAR else 0, 1)
        scores[rest] *= weights
        # A box that is dropped leaves its place to the last one: this order decides between equal scores.
        dropped, places, k = (scores[rest] < min_score).tolist(), rest.tolist(), 0
        while k < len(places):
            if dropped[k]:
                last, its_fate = places.pop(), dropped.pop()
                if k < len(places):
                    places[k], dropped[k] = last, its_fate
            else:
                k += 1
        at += 1
        left = at + len(places)
        rows[at:left] = rows.new_tensor(places)
    return rows[:left], scores[rows[:left]]


def _box_ious(boxes: Tensor, offset: float) -> Callable[[int], Tensor]:
    return lambda i: overlap.box_iou(boxes[i : i + 1], boxes[i + 1 :], overlap.IOU, False, offset)[0]


def _winners(
    count: int, ious: Callable[[int], Tensor], labels: Tensor | None, limit: float, device: torch.device
) -> Tensor:
    """For each box the one that suppressed it, or itself; ``ious(i)``: of box ``i`` with those after it."""
    winners = torch.arange(count, device=device)
    for i in range(count):
        if winners[i] != i:
            continue
        later = winners[i + 1 :]
        beaten = (ious(i) > limit) & (later > i)  # a box that is out was beaten by one before this one
        if labels is not None:
            beaten &= labels[i + 1 :] == labels[i]
        later[beaten] = i
    return winners


def _kept(winners: Tensor) -> Tensor:
    return winners == torch.arange(len(winners), device=winners.device)


def limit_of(threshold: float, dtype: torch.dtype, inclusive: bool = False) -> float:
    """What a ratio of that dtype must be above to be above the threshold, or, ``inclusive``, at it."""
    limit = torch.tensor(threshold, dtype=dtype)
    return (torch.nextafter(limit, torch.full_like(limit, -torch.inf)) if inclusive else limit).item()
