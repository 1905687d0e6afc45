"""Public ops of which boxes, or polygons, points lie in."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.boxes.overlap.ops import FLOATS
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which 3-D boxes each point lies in.

    Args:
        points: ``(B, M, 3)`` float16, bfloat16, float32 or float64: x, y, z.
        boxes: ``(B, T, 7)``, the same dtype: x, y and z of the middle of the bottom, size along x, y and z, heading in
            radians from x towards y.

    Returns:
        bool ``(B, M, T)``. What lies on the bottom or the top is inside, what lies on a side is not. Computed in
        float32, or in float64 for float64.

    Raises:
        ValueError: a shape, dtype or device is wrong.
        NoBackendError: no backend can run the call.
    """
    out: Tensor = ALL(*_prepared(points, boxes))
    return out


def first_box_of_points(points: Tensor, boxes: Tensor) -> Tensor:
    """The first of the boxes that each point lies in, int32 ``(B, M)``, -1 for none; see :func:`points_in_boxes`."""
    out: Tensor = FIRST(*_prepared(points, boxes))
    return out


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    """Which quadrilaterals each point lies in.

    Args:
        points: ``(N, 2)``, dtypes as for :func:`points_in_boxes`.
        polygons: ``(M, 8)``, the same dtype: x1, y1 to x4, y4.

    Returns:
        bool ``(N, M)``. What lies exactly on an edge may be either way, but is the same on every backend.

    Raises:
        ValueError, NoBackendError: as for :func:`points_in_boxes`.
    """
    _check("points", points, (None, 2))
    _check("polygons", polygons, (None, 8))
    _check_alike(points, polygons, "polygons")
    wide = torch.promote_types(points.dtype, torch.float32)
    out: Tensor = POLYGONS(points.to(wide), polygons.to(wide))
    return out


def _prepared(points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Points, and of each box ``(B, 8, T)``: its centre, halves of its sizes, cosine and sine of its heading.

    All backends then compare the same numbers, whatever their own cosine is.
    """
    _check("points", points, (None, None, 3))
    _check("boxes", boxes, (points.shape[0], None, 7))
    _check_alike(points, boxes, "boxes")
    wide = torch.promote_types(points.dtype, torch.float32)
    x, y, z, *sizes, heading = boxes.to(wide).unbind(2)
    halves = [size / 2 for size in sizes]
    return points.to(wide), torch.stack((x, y, z + halves[2], *halves, heading.cos(), heading.sin()), 1)


def _check(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = value.dim() == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
    if value.dtype not in FLOATS or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, expected floating point ({wanted})")


def _check_alike(points: Tensor, others: Tensor, name: str) -> None:
    if others.dtype != points.dtype or others.device != points.device:
        raise ValueError(f"{name} is {others.dtype} on {others.device}, points {points.dtype} on {points.device}")


ALL = Op(
    "points_in_boxes_all(Tensor points, Tensor frames) -> Tensor",
    fake=lambda points, frames: points.new_empty((*points.shape[:2], frames.shape[2]), dtype=torch.bool),
)
FIRST = Op(
    "points_in_boxes_first(Tensor points, Tensor frames) -> Tensor",
    fake=lambda points, frames: points.new_empty(points.shape[:2], dtype=torch.int32),
)
POLYGONS = Op(
    "points_in_polygons(Tensor points, Tensor polygons) -> Tensor",
    fake=lambda points, polygons: points.new_empty((points.shape[0], polygons.shape[0]), dtype=torch.bool),
)
for _op in (ALL, FIRST, POLYGONS):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
        _run, _supports = (
            deferred(f"kernelgraft_core.boxes.points.{_backend}", name) for name in (_op.name, f"supports_{_op.name}")
        )
        _op.register(Implementation(_backend, _run, (_device,), 10, _supports))
