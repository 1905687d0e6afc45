"""Public ops of how much boxes overlap: axis-aligned, rotated, quadrilateral, and 3-D boxes seen from above."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.boxes.outlines import quad_outlines, rotated_outlines
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = {"iou": reference.IOU, "iof": reference.IOF}
BEV = [0, 1, 3, 4, 6]  # of a 3-D box: what a box seen from above has


def box_iou(a: Tensor, b: Tensor, mode: str = "iou", aligned: bool = False, offset: float = 0) -> Tensor:
    """How much axis-aligned boxes overlap.

    Args:
        a: ``(N, 4)`` float16, bfloat16, float32 or float64: x1, y1, x2, y2.
        b: ``(M, 4)``, the same dtype.
        mode: ``"iou"``, the shared area over that of the union, or ``"iof"``, over that of ``a``.
        aligned: compare ``a[i]`` with ``b[i]`` only; N and M are equal then.
        offset: added to widths and heights; 1 where corners are pixels that belong to the box.

    Returns:
        ``(N, M)``, or ``(N,)`` if aligned, dtype of ``a``; 0 where there is nothing to divide by. Computed in float32,
        or in float64 for float64. Not differentiable.

    Raises:
        ValueError: a shape, dtype, device or mode is wrong.
        NoBackendError: no backend can run the call.
    """
    _check(a, b, 4, mode, aligned)
    out: Tensor = BOX_IOU(a, b, MODES[mode], aligned, float(offset))
    return out


def rotated_iou(a: Tensor, b: Tensor, mode: str = "iou", aligned: bool = False) -> Tensor:
    """How much rotated boxes overlap, exactly: the area that two rectangles share is computed in float64.

    Args:
        a: ``(N, 5)``: centre x, centre y, width, height, angle in radians, counted from x towards y (clockwise where y
            points down).
        b: ``(M, 5)``, the same dtype.
        mode, aligned: as for :func:`box_iou`.

    Returns:
        ``(N, M)``, or ``(N,)`` if aligned, dtype of ``a``. 0 for a box that has no positive area, or NaN. Not
        differentiable.

    Raises:
        ValueError, NoBackendError: as for :func:`box_iou`.
    """
    _check(a, b, 5, mode, aligned)
    out: Tensor = OUTLINE_OVERLAP(rotated_outlines(a), rotated_outlines(b), MODES[mode], aligned, a.dtype)
    return out


def quad_iou(a: Tensor, b: Tensor, mode: str = "iou", aligned: bool = False) -> Tensor:
    """How much convex quadrilaterals overlap.

    ``a`` is ``(N, 8)``, ``b`` ``(M, 8)``: x1, y1 to x4, y4, either way around. Everything else as for
    :func:`rotated_iou`.
    """
    _check(a, b, 8, mode, aligned)
    out: Tensor = OUTLINE_OVERLAP(quad_outlines(a), quad_outlines(b), MODES[mode], aligned, a.dtype)
    return out


def boxes_overlap_bev(a: Tensor, b: Tensor) -> Tensor:
    """The area that 3-D boxes share seen from above, ``(N, M)``, in square units of their sizes.

    Args:
        a: ``(N, 7)``: x, y, z, size along x, y and z, heading in radians.
        b: ``(M, 7)``, the same dtype.

    Raises:
        ValueError, NoBackendError: as for :func:`box_iou`.
    """
    _check(a, b, 7, "iou", False)
    outlines = rotated_outlines(a[:, BEV]), rotated_outlines(b[:, BEV])
    out: Tensor = OUTLINE_OVERLAP(*outlines, reference.AREA_OF_OVERLAP, False, a.dtype)
    return out


def _check(a: Tensor, b: Tensor, numbers: int, mode: str, aligned: bool) -> None:
    for name, boxes in (("a", a), ("b", b)):
        if boxes.dtype not in FLOATS or boxes.dim() != 2 or boxes.shape[1] != numbers:
            raise ValueError(f"{name} is {boxes.dtype} {tuple(boxes.shape)}, expected floating point (N, {numbers})")
    if b.dtype != a.dtype or b.device != a.device:
        raise ValueError(f"b is {b.dtype} on {b.device}, a {a.dtype} on {a.device}")
    if aligned and a.shape[0] != b.shape[0]:
        raise ValueError(f"there are {a.shape[0]} boxes a and {b.shape[0]} boxes b, aligned needs as many of both")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {tuple(MODES)}")


BOX_IOU = Op(
    "box_iou(Tensor a, Tensor b, int mode, bool aligned, float offset) -> Tensor",
    fake=lambda a, b, mode, aligned, offset: a.new_empty(
        (a.shape[0],) if aligned else (a.shape[0], b.shape[0]),
    ),
)
OUTLINE_OVERLAP = Op(
    "outline_overlap(Tensor a, Tensor b, int mode, bool aligned, ScalarType dtype) -> Tensor",
    fake=lambda a, b, mode, aligned, dtype: a.new_empty(
        (a.shape[1],) if aligned else (a.shape[1], b.shape[1]), dtype=dtype
    ),
)
for _op in (BOX_IOU, OUTLINE_OVERLAP):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
        _run, _supports = (
            deferred(f"kernelgraft_core.boxes.overlap.{_backend}", name) for name in (_op.name, f"supports_{_op.name}")
        )
        _op.register(Implementation(_backend, _run, (_device,), 10, _supports))
