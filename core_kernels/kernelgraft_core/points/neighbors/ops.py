"""Public ops that look for neighbours: the nearest ones, and those within a ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred
from kernelgraft_core.sparse.grids import starts_of

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def knn(
    points: Tensor,
    centers: Tensor,
    neighbors: int,
    point_counts: Tensor | None = None,
    center_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest points of each center, by distance, and equally far ones by number.

    Args:
        points: ``(B, N, 3)`` or, with counts, clouds one after another ``(N_1 + N_2 + ..., 3)``; float16, bfloat16,
            float32 or float64. Half types are computed in float32. NaN and infinity are near nothing.
        centers: the same, ``(B, M, 3)`` or ``(M_1 + M_2 + ..., 3)``.
        neighbors: how many, K, at least 1.
        point_counts, center_counts: integers ``(B,)``: the points and centers of each cloud; both or neither.

    Returns:
        numbers of points in their cloud, int32 ``(B, M, K)`` or ``(M_1 + M_2 + ..., K)``, -1 where a cloud has no more;
        and squared distances, float64 for float64 points and otherwise float32, infinite there. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices are wrong; sums of counts on a CPU alone, as asking a GPU would wait.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors is {neighbors}, expected at least 1")
    flat, starts, shape = _clouds(points, centers, point_counts, center_counts)
    rows, squares = KNN(*flat, *starts, neighbors)
    return rows.view(*shape, neighbors), squares.view(*shape, neighbors)


def three_nn(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """The three nearest sources ``(B, M, 3)`` of each target ``(B, N, 3)`` (PointNet++, arXiv 1706.02413).

    Returns:
        squared distances ``(B, N, 3)``, and numbers int32 ``(B, N, 3)``; see :func:`knn`.

    Raises:
        ValueError: as for :func:`knn`.
    """
    rows, squares = knn(sources, targets, 3)
    return squares, rows


def ball_query(
    points: Tensor,
    centers: Tensor,
    max_radius: float,
    samples: int,
    min_radius: float = 0.0,
    point_counts: Tensor | None = None,
    center_counts: Tensor | None = None,
) -> Tensor:
    """The first points, by number, with ``min_radius <= distance < max_radius`` (PointNet++, arXiv 1706.02413).

    A point in the place of the center counts too. Radii are squared in float32, as mmcv does.

    Args:
        points, centers, point_counts, center_counts: see :func:`knn`.
        max_radius, min_radius: ``0 <= min_radius < max_radius``, in the unit of the points.
        samples: how many at most, S, at least 1.

    Returns:
        numbers of points in their cloud, int32 ``(B, M, S)`` or ``(M_1 + M_2 + ..., S)``. Where there are fewer, the
        first fills the rest; where there are none, all are -1.

    Raises:
        ValueError: shapes, dtypes, devices, counts or radii are wrong.
    """
    if samples < 1 or not 0 <= min_radius < max_radius or math.isinf(max_radius):
        raise ValueError(
            f"samples is {samples}, min_radius {min_radius}, max_radius {max_radius}; expected at least 1 and "
            "0 <= min_radius < max_radius, finite"
        )
    flat, starts, shape = _clouds(points, centers, point_counts, center_counts)
    rows: Tensor = BALL(*flat, *starts, float(min_radius), float(max_radius), samples)
    return rows.view(*shape, samples)


def _clouds(
    points: Tensor, centers: Tensor, point_counts: Tensor | None, center_counts: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[int, ...]]:
    """Points and centers ``(N, 3)`` and ``(M, 3)``, where clouds begin in each, and the shape of centers."""
    dimensions = 3 if point_counts is None else 2
    for name, tensor in (("points", points), ("centers", centers)):
        if tensor.dim() != dimensions or tensor.shape[-1] != 3 or tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating point "
                f"{'(B, N, 3)' if dimensions == 3 else '(N, 3)'}"
            )
    if centers.dtype != points.dtype or centers.device != points.device:
        raise ValueError(f"centers is {centers.dtype} on {centers.device}, points {points.dtype} on {points.device}")
    wide = torch.promote_types(points.dtype, torch.float32)
    flat = points.to(wide).reshape(-1, 3).contiguous(), centers.to(wide).reshape(-1, 3).contiguous()
    shape = tuple(centers.shape[:-1])
    if max(len(flat[0]), len(flat[1])) >= 1 << 31:
        raise ValueError(f"there are {len(flat[0])} points and {len(flat[1])} centers, at most 2^31 - 1 are supported")
    if point_counts is None and center_counts is None:
        if points.shape[0] != centers.shape[0]:
            raise ValueError(f"points is {tuple(points.shape)} and centers {tuple(centers.shape)}: clouds differ")
        clouds = torch.arange(points.shape[0] + 1, device=points.device)
        return flat, (clouds * points.shape[1], clouds * centers.shape[1]), shape
    if point_counts is None or center_counts is None:
        raise ValueError("point_counts and center_counts belong together: one is there, the other is not")
    return flat, _starts(point_counts, len(points), center_counts, len(centers)), shape


def _starts(point_counts: Tensor, points: int, center_counts: Tensor, centers: int) -> tuple[Tensor, Tensor]:
    for name, counts, total in (("point_counts", point_counts, points), ("center_counts", center_counts, centers)):
        if counts.dim() != 1 or counts.is_floating_point() or counts.shape != point_counts.shape:
            raise ValueError(f"{name} is {counts.dtype} {tuple(counts.shape)}, expected integers (B,), as many of each")
        if counts.device.type == "cpu" and (int(counts.sum()) != total or bool((counts < 0).any())):
            raise ValueError(f"{name} is {counts.tolist()}, expected none below 0 and a sum of {total}")
    return starts_of(point_counts.long()), starts_of(center_counts.long())


KNN = Op(
    "points_knn(Tensor points, Tensor centers, Tensor point_starts, Tensor center_starts, int neighbors)"
    " -> (Tensor, Tensor)",
    fake=lambda points, centers, point_starts, center_starts, neighbors: (
        points.new_empty((centers.shape[0], neighbors), dtype=torch.int32),
        points.new_empty((centers.shape[0], neighbors)),
    ),
)
BALL = Op(
    "points_in_ball(Tensor points, Tensor centers, Tensor point_starts, Tensor center_starts, float min_radius,"
    " float max_radius, int samples) -> Tensor",
    fake=lambda points, centers, point_starts, center_starts, min_radius, max_radius, samples: points.new_empty(
        (centers.shape[0], samples), dtype=torch.int32
    ),
)
for _op in (KNN, BALL):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
        _run, _supports = (
            deferred(f"kernelgraft_core.points.neighbors.{_backend}", name)
            for name in (_op.name, f"supports_{_op.name}")
        )
        _op.register(Implementation(_backend, _run, (_device,), 10, _supports))
