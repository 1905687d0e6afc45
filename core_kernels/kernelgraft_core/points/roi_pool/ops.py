"""Public ops that pool the points in oriented boxes: RoI-aware and RoI point pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.points.grouping import take_rows
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("max", "avg")


def roi_aware_pool(
    rois: Tensor, points: Tensor, feats: Tensor, out_size: Sequence[int], max_points: int, mode: str = "max"
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the features of points in each cell of a grid that turns with its box (Part-A2, arXiv 1907.03670).

    Args:
        rois: ``(R, 7)``: x, y and z of the centre of the bottom, sizes along x, y and z, and the angle about z in
            radians, against the clock seen from above. Any floating point type; half types are computed in float32.
        points: ``(N, 3)``, dtype of ``rois``. Strictly inside in x and y, and also on the bounds in z.
        feats: ``(N, C)`` floating point.
        out_size: cells along x, y and z.
        max_points: numbers of a cell, the first of which is how many points it has: the ``max_points - 1`` points with
            the lowest numbers are pooled.
        mode: ``"max"``, of the first of equals, or ``"avg"``. NaN and minus infinity take no part in a maximum.

    Returns:
        pooled features ``(R, X, Y, Z, C)``, 0 where there is no point, differentiable in ``feats``; the point of each
        maximum, int32 ``(R, X, Y, Z, C)``, -1 for none, or no numbers for ``"avg"``; and int32
        ``(R, X, Y, Z, max_points)``: how many points a cell has, and these.

    Raises:
        ValueError: a shape, dtype, size or mode is wrong.
    """
    _check(rois, points, feats, (-1, 7), (-1, 3))
    if len(out_size) != 3 or min(out_size) < 1 or max_points < 1 or mode not in MODES:
        raise ValueError(
            f"out_size is {tuple(out_size)}, max_points {max_points}, mode {mode!r}; expected three of at least 1, at "
            f"least 1, and one of {MODES}"
        )
    found: tuple[Tensor, Tensor, Tensor] = _Pool.apply(  # type: ignore[no-untyped-call]
        rois, points, feats, tuple(out_size), max_points, mode
    )
    return found


def roi_aware_pool_into(
    rois: Tensor, points: Tensor, feats: Tensor, pooled: Tensor, source: Tensor, members: Tensor, mode: str = "max"
) -> None:
    """:func:`roi_aware_pool` into memory that is there, whose sizes say how many cells and points; no gradient.

    Args:
        pooled: ``(R, X, Y, Z, C)``, dtype of ``feats``, all 0.
        source: int32, the same shape; only ``"max"`` writes to it.
        members: int32 ``(R, X, Y, Z, max_points)``, all 0.

    Raises:
        ValueError: as for :func:`roi_aware_pool`, or what is there does not fit.
    """
    _check(rois, points, feats, (-1, 7), (-1, 3))
    cells = (rois.shape[0], *members.shape[1:4])
    shape = (*cells, feats.shape[1])
    for name, tensor, dtype, wanted in (
        ("pooled", pooled, feats.dtype, shape),
        ("source", source, torch.int32, shape if mode == "max" else source.shape),
        ("members", members, torch.int32, (*cells, *members.shape[4:])),
    ):
        if tensor.dtype != dtype or tensor.shape != wanted or tensor.device != feats.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {dtype} {tuple(wanted)} "
                f"on {feats.device}"
            )
    if members.dim() != 5 or min(members.shape[1:]) < 1 or mode not in MODES:
        raise ValueError(
            f"members is {tuple(members.shape)}, mode {mode!r}; expected (R, X, Y, Z, max_points), none of them empty, "
            f"and one of {MODES}"
        )
    wide = torch.promote_types(rois.dtype, torch.float32)
    AWARE(rois.to(wide), points.to(wide), feats, pooled, source, members, mode)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rois: Tensor, points: Tensor, feats: Tensor, out_size: tuple[int, ...], most: int, mode: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        cells = (rois.shape[0], *out_size)
        pooled = feats.new_zeros((*cells, feats.shape[1]))
        source = feats.new_empty(pooled.shape if mode == "max" else (0,), dtype=torch.int32)
        members = feats.new_zeros((*cells, most), dtype=torch.int32)
        roi_aware_pool_into(rois, points, feats, pooled, source, members, mode)
        ctx.points, ctx.mode = feats.shape[0], mode
        ctx.save_for_backward(source, members)
        ctx.mark_non_differentiable(source, members)
        return pooled, source, members

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        source, members = ctx.saved_tensors
        return None, None, roi_aware_gradient(grad, source, members, ctx.points, ctx.mode), None, None, None


def roi_aware_gradient(grad: Tensor, source: Tensor, members: Tensor, points: int, mode: str) -> Tensor:
    """Gradient ``(N, C)`` of the features of ``points`` points, from that ``(R, X, Y, Z, C)`` of what was pooled.

    Sums are in a settled order. ``source`` and ``members`` are what :func:`roi_aware_pool` gave.
    """
    found: Tensor = GRADIENT(grad, source, members, points, mode)
    return found


def roi_point_pool(points: Tensor, feats: Tensor, rois: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Places and features of the first points in each box (PointRCNN, arXiv 1812.04244).

    Args:
        points: ``(B, N, 3)``; feats: ``(B, N, C)``; floating point.
        rois: ``(B, R, 7)``; see :func:`roi_aware_pool`. dtype of ``points``.
        samples: how many, S, at least 1. Fewer are repeated from the first on.

    Returns:
        ``(B, R, S, 3 + C)``, dtype of ``feats``, 0 for empty boxes, differentiable in ``feats`` and ``points``; and
        int32 ``(B, R)``, 1 for empty boxes.

    Raises:
        ValueError: a shape, dtype or size is wrong.
    """
    _check(rois, points, feats, (-1, -1, 7), (-1, -1, 3))
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    wide = torch.promote_types(points.dtype, torch.float32)
    rows: Tensor = INSIDE(points.to(wide), rois.to(wide), samples)
    empty = rows[..., 0] < 0
    both = torch.cat((points.to(feats.dtype), feats), 2)
    first = torch.arange(both.shape[0], device=both.device).view(-1, 1, 1) * both.shape[1]
    return take_rows(both.flatten(0, 1), torch.where(rows < 0, -1, rows + first)), empty.int()


def _check(rois: Tensor, points: Tensor, feats: Tensor, rois_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    for name, tensor, wanted in (("rois", rois, rois_shape), ("points", points, shape), ("feats", feats, shape)):
        fits = tensor.dim() == len(wanted) and (name == "feats" or tensor.shape[-1] == wanted[-1])
        if not fits or tensor.dtype not in FLOATS or tensor.device != points.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected floating point of "
                f"{len(wanted)} dimensions on {points.device}" + ("" if name == "feats" else f", the last {wanted[-1]}")
            )
    if rois.dtype != points.dtype:
        raise ValueError(f"rois is {rois.dtype}, points {points.dtype}")
    if feats.shape[:-1] != points.shape[:-1] or (points.dim() == 3 and rois.shape[0] != points.shape[0]):
        raise ValueError(
            f"rois is {tuple(rois.shape)}, points {tuple(points.shape)}, feats {tuple(feats.shape)}: sizes differ"
        )


AWARE = Op(
    "roi_aware_pool(Tensor rois, Tensor points, Tensor feats, Tensor(a!) pooled, Tensor(b!) source,"
    " Tensor(c!) members, str pooling) -> ()",
    fake=lambda rois, points, feats, pooled, source, members, pooling: None,
)
GRADIENT = Op(
    "roi_aware_gradient(Tensor grad, Tensor source, Tensor members, SymInt points, str pooling) -> Tensor",
    fake=lambda grad, source, members, points, pooling: grad.new_empty((points, grad.shape[4])),
)
INSIDE = Op(
    "points_in_rois(Tensor points, Tensor rois, int samples) -> Tensor",
    fake=lambda points, rois, samples: points.new_empty((points.shape[0], rois.shape[1], samples), dtype=torch.int32),
)
GRADIENT.register(Implementation("reference", reference.roi_aware_gradient, ("cpu", "cuda")))
GRADIENT.register(Implementation("cpu", reference.roi_aware_gradient, ("cpu",), 10))  # its sums are compiled there
for _op in (AWARE, INSIDE):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _run, _supports = (
        deferred("kernelgraft_core.points.roi_pool.cpu", name) for name in (_op.name, f"supports_{_op.name}")
    )
    _op.register(Implementation("cpu", _run, ("cpu",), 10, _supports))
