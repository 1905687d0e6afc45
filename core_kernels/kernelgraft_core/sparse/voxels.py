"""Between points and voxels: means of points in a voxel, and values of voxels at points."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .coordinates import Coordinates
from .grids import grid_keys, grid_sites, grid_steps
from .tensor import SparseTensor

LARGEST_SITE = (1 << 31) - 1


def voxelize(
    points: Tensor,
    feats: Tensor,
    voxel_size: float | Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    batch: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[SparseTensor, Tensor]:
    """Means of the features of points in the same voxel; voxels in the order of their coordinates.

    Args:
        points: ``(P, D)`` in metres, or whatever ``voxel_size`` is in; float32 or float64.
        feats: ``(P, C)`` floating point, summed in float32 at least.
        voxel_size: one number, or one for each axis.
        low, high: corners of the grid; points outside (``low <= point < high``) are left out. By default the least box
            that holds all points, whose lower corner then is a multiple of the voxel's size.
        batch: integer ``(P,)``, the grid of each point; by default there is one grid.
        batch_size: number of grids; by default one more than the largest of ``batch``.

    Returns:
        The tensor, and int64 ``(P,)``: the row of each point's voxel, -1 for points outside. Differentiable in
        ``feats``.

    Raises:
        ValueError: shapes or dtypes are wrong, a point is not finite, or the grid is too large to be numbered.
    """
    if points.dim() != 2 or points.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"points is {points.dtype} {tuple(points.shape)}, expected float32 or float64 (P, D)")
    count, dimensions = points.shape
    if feats.dim() != 2 or len(feats) != count or not feats.is_floating_point():
        raise ValueError(f"feats is {feats.dtype} {tuple(feats.shape)}, expected floating point ({count}, C)")
    if batch is not None and (batch.shape != (count,) or batch.is_floating_point()):
        raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}, expected integers ({count},)")
    if not bool(points.isfinite().all()):
        row = int((~points.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"point {row} is {points[row].tolist()}, expected finite numbers")
    size = torch.tensor(_numbers("voxel_size", voxel_size, dimensions), dtype=points.dtype, device=points.device)
    if not bool((size > 0).all()):
        raise ValueError(f"voxel_size is {voxel_size}, expected more than 0")
    cells, shape = _cells(points, size, low, high)
    if batch is None:
        grids, batch_size = cells.new_zeros(count), 1 if batch_size is None else batch_size
    else:
        grids = batch.long()
        batch_size = int(grids.max()) + 1 if batch_size is None and count else batch_size or 0
    inside = ((cells >= 0) & (cells < torch.tensor(shape, device=cells.device))).all(1)
    steps = grid_steps(shape, batch_size)
    sites, voxel = grid_keys(torch.cat((grids.unsqueeze(1), cells), 1)[inside], steps).unique(return_inverse=True)
    rows = torch.full((count,), -1, device=points.device)
    rows[inside] = voxel
    wide = torch.promote_types(feats.dtype, torch.float32)
    total = feats.new_zeros((len(sites), feats.shape[1]), dtype=wide).index_add(0, voxel, feats[inside].to(wide))
    counts = torch.bincount(voxel, minlength=len(sites)).to(wide).unsqueeze(1)
    coordinates = Coordinates(grid_sites(sites, steps), shape, batch_size)
    return SparseTensor((total / counts).to(feats.dtype), coordinates), rows


def _cells(
    points: Tensor, size: Tensor, low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[Tensor, tuple[int, ...]]:
    """The voxel of each point, int64 ``(P, D)``, -1 for points that are left out, and the shape of the grid."""
    inside = torch.ones(len(points), dtype=torch.bool, device=points.device)
    corner = None if low is None else _corner("low", low, points)
    if corner is not None:
        inside &= (points >= corner).all(1)
    if high is not None:
        inside &= (points < _corner("high", high, points)).all(1)
    cells = torch.floor((points if corner is None else points - corner) / size)
    if corner is None and bool(inside.any()):
        cells -= cells[inside].amin(0)
    largest = cells[inside].amax(0).tolist() if bool(inside.any()) else [0.0] * points.shape[1]
    if max(largest) >= LARGEST_SITE:
        raise ValueError(f"voxels of {size.tolist()} number a point's voxel {max(largest):.0f}, over 2^31")
    shape = tuple(int(each) + 1 for each in largest)
    if corner is not None and high is not None:
        # The extent may miss a whole number by what floats round; a point in the voxel beyond is left out then.
        shape = tuple(torch.ceil((_corner("high", high, points) - corner) / size - 1e-4).long().clamp(min=1).tolist())
    return torch.where(inside.unsqueeze(1), cells, -1).long(), shape


def devoxelize(x: SparseTensor, positions: Tensor, batch: Tensor | None = None, nearest: bool = False) -> Tensor:
    """Values of voxels at points: of the voxel that holds a point, or between the centres of its neighbours.

    Voxels that are not there take no part: the weights of the others are scaled up to one. Where there is none it
    is 0.

    Args:
        positions: float ``(P, D)`` in voxels: voxel ``i`` reaches from ``i`` to ``i + 1``.
        batch: integer ``(P,)``, the grid of each point; by default all are of the first.
        nearest: only the voxel that holds the point; otherwise linear in every axis.

    Returns:
        ``(P, C)``, dtype of the features. Differentiable in the features.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    dimensions = x.coordinates.dimensions
    if positions.dim() != 2 or positions.shape[1] != dimensions or not positions.is_floating_point():
        raise ValueError(
            f"positions is {positions.dtype} {tuple(positions.shape)}, expected floating point (P, {dimensions})"
        )
    grids = torch.zeros(len(positions), dtype=torch.int64, device=x.device) if batch is None else batch.long()
    centre = positions if nearest else positions - 0.5
    lower = torch.floor(centre)
    parts = centre - lower
    values = x.feats.new_zeros((len(positions), x.channels), dtype=torch.promote_types(x.feats.dtype, torch.float32))
    weights = values.new_zeros((len(positions), 1))
    for corner in [(0,) * dimensions] if nearest else itertools.product((0, 1), repeat=dimensions):
        move = torch.tensor(corner, device=x.device)
        weight = values.new_ones(len(positions))
        if not nearest:
            weight = torch.where(move > 0, parts, 1 - parts).prod(1).to(values.dtype)
        rows = x.coordinates.find(torch.cat((grids.unsqueeze(1), lower.long() + move), 1))
        weight = torch.where(rows >= 0, weight, 0).unsqueeze(1)
        values = values + weight * x.feats[rows.clamp(min=0)] if len(x.feats) else values
        weights = weights + weight
    return (values / torch.where(weights > 0, weights, 1)).to(x.feats.dtype)


def _numbers(name: str, value: float | Sequence[float], dimensions: int) -> list[float]:
    numbers = [float(value)] * dimensions if isinstance(value, int | float) else [float(each) for each in value]
    if len(numbers) != dimensions:
        raise ValueError(f"{name} is {value}, expected one number or {dimensions}")
    return numbers


def _corner(name: str, value: Sequence[float], points: Tensor) -> Tensor:
    return torch.tensor(_numbers(name, value, points.shape[1]), dtype=points.dtype, device=points.device)
