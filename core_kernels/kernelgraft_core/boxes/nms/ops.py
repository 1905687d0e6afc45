"""Public ops of non-maximum suppression: of axis-aligned, rotated and quadrilateral boxes, hard and soft."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelgraft_core.boxes.outlines import quad_outlines, rotated_outlines
from kernelgraft_core.boxes.overlap.ops import FLOATS
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

METHODS = {"naive": reference.NAIVE, "linear": reference.LINEAR, "gaussian": reference.GAUSSIAN}


def nms(
    boxes: Tensor,
    scores: Tensor | None,
    iou_threshold: float,
    offset: float = 0,
    labels: Tensor | None = None,
    inclusive: bool = False,
) -> Tensor:
    """Which axis-aligned boxes are left when every box that overlaps a better one is dropped.

    The best box is kept and drops those whose intersection over union with it is above the threshold; then the best of
    what is left, and so on. Of equal scores the first counts as the better one.

    Args:
        boxes: ``(N, 4)`` float16, bfloat16, float32 or float64: x1, y1, x2, y2. Compared in float32,
            float64 in float64.
        scores: ``(N,)`` floating point; None where the boxes come by descending score already.
        iou_threshold: rounded as the ratios are that it is compared with.
        offset: added to widths and heights; 1 where corners are pixels that belong to the box.
        labels: integers ``(N,)``; boxes of different labels do not drop each other.
        inclusive: drop at the threshold too.

    Returns:
        int64 ``(K,)``: the rows that are kept, by descending score. The same on every device and backend, but where a
        ratio is at the threshold to the last bit.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the threshold is NaN.
        NoBackendError: no backend can run the call.
    """
    threshold = _checked(iou_threshold)
    boxes, order, labels = _by_score(boxes, scores, labels, 4)
    wide = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return _rows(order, NMS_BOXES(wide, labels, threshold, inclusive, float(offset)))


def rotated_nms(
    boxes: Tensor,
    scores: Tensor | None,
    iou_threshold: float,
    labels: Tensor | None = None,
    inclusive: bool = False,
) -> Tensor:
    """The same for rotated boxes ``(N, 5)``: centre x, centre y, width, height, angle in radians.

    Ratios are computed in float64 and rounded to float32 (float64 for float64) before they are compared.
    """
    boxes, order, labels = _by_score(boxes, scores, labels, 5)
    return _nms_outlines(rotated_outlines(boxes), boxes.dtype, order, labels, iou_threshold, inclusive)


def quad_nms(
    boxes: Tensor,
    scores: Tensor | None,
    iou_threshold: float,
    labels: Tensor | None = None,
    inclusive: bool = False,
) -> Tensor:
    """The same for convex quadrilaterals ``(N, 8)``: x1, y1 to x4, y4, either way around."""
    boxes, order, labels = _by_score(boxes, scores, labels, 8)
    return _nms_outlines(quad_outlines(boxes), boxes.dtype, order, labels, iou_threshold, inclusive)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: float = 0,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of boxes that overlap better ones, instead of dropping them (Soft-NMS, arXiv 1704.04503).

    Args:
        boxes, scores, offset: as for :func:`nms`; the same dtype.
        iou_threshold: from which on ``"naive"`` makes a score 0 and ``"linear"`` multiplies it by ``1 - iou``.
        sigma: ``"gaussian"`` multiplies all scores by ``exp(-iou^2 / sigma)``.
        min_score: a box whose score falls below is dropped.

    Returns:
        int64 ``(K,)``, the rows that are left, and their scores ``(K,)``, descending.

    Raises:
        ValueError, NoBackendError: as for :func:`nms`; also for an unknown method, or a sigma that is not positive.
    """
    _check(boxes, scores, None, 4)
    if scores.dtype != boxes.dtype:
        raise ValueError(f"scores is {scores.dtype}, boxes {boxes.dtype}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {tuple(METHODS)}")
    if method == "gaussian" and not sigma > 0:
        raise ValueError(f"sigma is {sigma}, expected more than 0")
    wide = torch.promote_types(boxes.dtype, torch.float32)
    numbers = (float(number) for number in (iou_threshold, sigma, min_score))
    rows, left = SOFT_NMS(boxes.to(wide), scores.to(wide), *numbers, METHODS[method], float(offset))
    return rows, left.to(scores.dtype)


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[Tensor]:
    """Groups of boxes: each that :func:`nms` with ``inclusive`` keeps, and those that it drops.

    Returns:
        for each kept box, by descending score, int64 rows: itself, then what it drops by descending score.

    Raises:
        ValueError, NoBackendError: as for :func:`nms`.
    """
    boxes, order, _ = _by_score(boxes, scores, None, 4)
    wide = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    winners = NMS_MATCH(wide, _checked(iou_threshold))
    grouped, places = winners.sort(stable=True)
    rows = places if order is None else order[places]
    return list(rows.split(grouped.unique_consecutive(return_counts=True)[1].tolist()))


def _by_score(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, numbers: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Boxes and labels by descending score, and the row of each."""
    _check(boxes, scores, labels, numbers)
    labels = None if labels is None else labels.long()
    if scores is None:
        return boxes, None, labels
    order = scores.sort(descending=True, stable=True)[1]
    return boxes[order], order, None if labels is None else labels[order]


def _check(boxes: Tensor, scores: Tensor | None, labels: Tensor | None, numbers: int) -> None:
    if boxes.dtype not in FLOATS or boxes.dim() != 2 or boxes.shape[1] != numbers:
        raise ValueError(f"boxes is {boxes.dtype} {tuple(boxes.shape)}, expected floating point (N, {numbers})")
    for name, each in (("scores", scores), ("labels", labels)):
        if each is None:
            continue
        if each.shape != boxes.shape[:1] or each.is_floating_point() != (name == "scores"):
            kind = "floating point" if name == "scores" else "integers"
            raise ValueError(f"{name} is {each.dtype} {tuple(each.shape)}, expected {kind} ({boxes.shape[0]},)")
        if each.device != boxes.device:
            raise ValueError(f"{name} is on {each.device}, boxes on {boxes.device}")


def _nms_outlines(
    outlines: Tensor,
    dtype: torch.dtype,
    order: Tensor | None,
    labels: Tensor | None,
    threshold: float,
    inclusive: bool,
) -> Tensor:
    keep = NMS_OUTLINES(outlines, labels, _checked(threshold), inclusive, dtype != torch.float64)
    return _rows(order, keep)


def _checked(threshold: float) -> float:
    if math.isnan(threshold):
        raise ValueError(f"iou_threshold is {threshold}, expected a number")
    return float(threshold)


def _rows(order: Tensor | None, keep: Tensor) -> Tensor:
    return keep.nonzero().squeeze(1) if order is None else order[keep]


def _fake_soft(
    boxes: Tensor, scores: Tensor, threshold: float, sigma: float, min_score: float, method: int, offset: float
) -> tuple[Tensor, Tensor]:
    left = torch.library.get_ctx().new_dynamic_size()  # only the data tell how many
    return scores.new_empty((left,), dtype=torch.int64), scores.new_empty((left,))


NMS_BOXES = Op(
    "nms_boxes(Tensor boxes, Tensor? labels, float threshold, bool inclusive, float offset) -> Tensor",
    fake=lambda boxes, labels, threshold, inclusive, offset: boxes.new_empty((boxes.shape[0],), dtype=torch.bool),
)
NMS_OUTLINES = Op(
    "nms_outlines(Tensor outlines, Tensor? labels, float threshold, bool inclusive, bool single) -> Tensor",
    fake=lambda outlines, labels, threshold, inclusive, single: outlines.new_empty(
        (outlines.shape[1],), dtype=torch.bool
    ),
)
NMS_MATCH = Op(
    "nms_match(Tensor boxes, float threshold) -> Tensor",
    fake=lambda boxes, threshold: boxes.new_empty((boxes.shape[0],), dtype=torch.int64),
)
SOFT_NMS = Op(
    "soft_nms(Tensor boxes, Tensor scores, float threshold, float sigma, float min_score, int method, float offset)"
    " -> (Tensor, Tensor)",
    fake=_fake_soft,
)
for _op in (NMS_BOXES, NMS_OUTLINES, NMS_MATCH, SOFT_NMS):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _cpu = (deferred("kernelgraft_core.boxes.nms.cpu", name) for name in (_op.name, f"supports_{_op.name}"))
    _op.register(Implementation("cpu", next(_cpu), ("cpu",), 10, next(_cpu)))
for _op in (NMS_BOXES, NMS_OUTLINES):
    _gpu = (deferred("kernelgraft_core.boxes.nms.triton", name) for name in (_op.name, f"supports_{_op.name}"))
    _op.register(Implementation("triton", next(_gpu), ("cuda",), 10, next(_gpu)))
