"""Gathering features of points by number, as PointNet++ and its kin do, with gradients in a settled order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernelgraft_core.sparse.grids import starts_of

from .neighbors.ops import knn
from .sums import sum_rows


def gather_points(feats: Tensor, index: Tensor) -> Tensor:
    """``out[b, c, ...] = feats[b, c, index[b, ...]]``.

    Args:
        feats: ``(B, C, N)``, differentiable.
        index: int32 or int64 ``(B, ...)``, 0 to N - 1.

    Returns:
        ``(B, C, ...)``.

    Raises:
        ValueError: a shape or dtype is wrong; IndexError or RuntimeError of torch: a number is out of range.
    """
    if feats.dim() != 3 or index.dim() < 2 or len(index) != len(feats) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"feats is {tuple(feats.shape)} and index {index.dtype} {tuple(index.shape)}, expected (B, C, N) and "
            "torch.int32 or torch.int64 (B, ...)"
        )
    found: Tensor = _Gather.apply(feats, index.flatten(1).long())  # type: ignore[no-untyped-call]
    out: Tensor = found.unflatten(2, index.shape[1:])
    return out


def gathered_gradient(grad: Tensor, index: Tensor, points: int) -> Tensor:
    """Gradient ``(B, C, N)`` of :func:`gather_points` for ``grad (B, C, K)`` and ``index (B, K)``."""
    clouds, channels = grad.shape[:2]
    first = torch.arange(clouds, device=index.device).unsqueeze(1) * points
    rows = sum_rows(grad.transpose(1, 2).flatten(0, 1), (index + first).flatten(), clouds * points)
    return rows.view(clouds, points, channels).transpose(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.points = feats.shape[2]
        return feats.gather(2, index.unsqueeze(1).expand(-1, feats.shape[1], -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered_gradient(grad, ctx.saved_tensors[0], ctx.points), None


def stacked_rows(index: Tensor, point_counts: Tensor, index_counts: Tensor) -> Tensor:
    """Numbers in a cloud as numbers among all: int64 of the shape of ``index (M, ...)``, -1 where there is no such one.

    Args:
        index: int32 or int64, numbers of points in their cloud.
        point_counts, index_counts: integers ``(B,)``: points of each cloud, and rows of ``index`` that belong to it.

    Raises:
        ValueError: counts do not belong together.
    """
    if point_counts.shape != index_counts.shape or point_counts.dim() != 1:
        raise ValueError(
            f"point_counts is {tuple(point_counts.shape)} and index_counts {tuple(index_counts.shape)}, expected (B,)"
        )
    shape = (len(index), *([1] * (index.dim() - 1)))
    counts = point_counts.long()
    cloud = torch.searchsorted(
        index_counts.long().cumsum(0), torch.arange(len(index), device=index.device), right=True
    ).clamp(max=max(0, len(counts) - 1))
    if not len(counts):
        return torch.full_like(index, -1, dtype=torch.int64)
    inside = (index >= 0) & (index < counts[cloud].view(shape))
    return torch.where(inside, index + starts_of(counts)[cloud].view(shape), -1)


def group_stacked_points(feats: Tensor, index: Tensor, point_counts: Tensor, index_counts: Tensor) -> Tensor:
    """Features ``(M, C, S)`` of points ``index (M, S)`` in their cloud; ``feats (N, C)`` holds one cloud after another.

    0 where ``index`` is no number of a point of the cloud. Differentiable in ``feats``. Counts are those of
    :func:`stacked_rows`.

    Raises:
        ValueError: shapes do not belong together.
    """
    if feats.dim() != 2 or index.dim() != 2:
        raise ValueError(f"feats is {tuple(feats.shape)} and index {tuple(index.shape)}, expected (N, C) and (M, S)")
    rows = stacked_rows(index, point_counts, index_counts)
    return take_rows(feats, rows).transpose(1, 2)


def take_rows(feats: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 ``(...)`` of ``feats (N, C)``, 0 for negative ones: ``(..., C)``, differentiable in ``feats``."""
    found: Tensor = _Rows.apply(feats, rows.flatten())  # type: ignore[no-untyped-call]
    out: Tensor = found.unflatten(0, rows.shape)
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.points = len(feats)
        if not len(feats):
            return feats.new_zeros((len(rows), feats.shape[1]))
        return torch.where((rows < 0).unsqueeze(1), 0, feats[rows.clamp(min=0)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grad, ctx.saved_tensors[0], ctx.points), None


def three_interpolate(feats: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``out[b, c, n] = sum_k weight[b, n, k] * feats[b, c, index[b, n, k]]`` (PointNet++, arXiv 1706.02413).

    Args:
        feats: ``(B, C, M)``; index: int32 or int64 ``(B, N, K)``; weight: ``(B, N, K)``. K is 3 in the paper.

    Returns:
        ``(B, C, N)``, dtype of ``feats``; summed in float32 at least. Differentiable in ``feats`` and ``weight``.

    Raises:
        ValueError: as for :func:`gather_points`, or ``weight`` has another shape than ``index``.
    """
    if weight.shape != index.shape:
        raise ValueError(f"weight is {tuple(weight.shape)}, index {tuple(index.shape)}")
    wide = torch.promote_types(feats.dtype, torch.float32)
    near = gather_points(feats, index).to(wide)
    return (near * weight.unsqueeze(1).to(wide)).sum(3).to(feats.dtype)


def chamfer_distance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared distance of each point to the nearest of the other cloud.

    Args:
        x: ``(B, N, D)``, y: ``(B, M, D)``; D is 2 or 3.

    Returns:
        distances ``(B, N)`` from x to y and ``(B, M)`` from y to x, differentiable, infinite where nothing is near;
        and the number of the nearest of each, int32, the lowest of equally near ones, -1 for none.

    Raises:
        ValueError: shapes, dtypes or devices are wrong.
    """
    if x.dim() != 3 or x.shape[-1] not in (2, 3) or y.shape[-1] != x.shape[-1]:
        raise ValueError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}, expected (B, N, D) and (B, M, D), D 2 or 3")
    padded = [torch.nn.functional.pad(each.detach(), (0, 3 - x.shape[-1])) for each in (x, y)]
    there, back = (knn(padded[1 - i], padded[i], 1)[0].squeeze(2) for i in range(2))
    return _squares(x, y, there), _squares(y, x, back), there, back


def _squares(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    if not y.shape[1]:
        return x.new_full(x.shape[:2], torch.inf)
    near = gather_points(y.transpose(1, 2), rows.clamp(min=0)).transpose(1, 2)
    return torch.where(rows < 0, torch.inf, (x - near).square().sum(2))


def assign_scores(scores: Tensor, points: Tensor, centers: Tensor, index: Tensor) -> Tensor:
    """Sums of what a bank of weights makes of points, by score (PAConv, arXiv 2103.14635).

    ``out[b, o, p, k] = sum_m scores[b, p, k, m] * (points[b, i, m, o] - centers[b, j, m, o])`` with ``i = index[b, p,
    k]`` and ``j = index[b, p, 0]``; 0 where one of them is no number of a point. One neighbour after another, so that
    no more than ``B * P * M * O`` numbers are held.

    Args:
        scores: ``(B, P, K, M)``; points, centers: ``(B, N, M, O)``; index: int32 or int64 ``(B, P, K)``.

    Returns:
        ``(B, O, P, K)``. Differentiable in all but ``index``, once.

    Raises:
        ValueError: shapes do not belong together.
    """
    if (
        scores.dim() != 4 or points.dim() != 4 or centers.shape != points.shape or index.shape != scores.shape[:3]
        or points.shape[0] != scores.shape[0] or points.shape[2] != scores.shape[3]
    ):  # fmt: skip
        raise ValueError(
            f"scores is {tuple(scores.shape)}, points {tuple(points.shape)}, centers {tuple(centers.shape)}, index "
            f"{tuple(index.shape)}; expected (B, P, K, M), twice (B, N, M, O), (B, P, K)"
        )
    found: Tensor = _AssignScores.apply(scores, points, centers, index.long())  # type: ignore[no-untyped-call]
    return found


class _AssignScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, points: Tensor, centers: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(scores, points, centers, index)
        (clouds, count, neighbors, _), channels = scores.shape, points.shape[3]
        out = points.new_zeros((clouds, channels, count, neighbors))
        for k in range(neighbors):
            out[..., k] = torch.einsum("bpm,bpmo->bop", scores[:, :, k], _differences(points, centers, index, k)[0])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scores, points, centers, index = ctx.saved_tensors
        width = points.shape[2] * points.shape[3]
        total = points.shape[0] * points.shape[1]
        grad_scores = torch.zeros_like(scores)
        grad_points, grad_centers = points.new_zeros((total, width)), centers.new_zeros((total, width))
        for k in range(index.shape[2]):
            difference, rows, middle = _differences(points, centers, index, k)
            given = grad[..., k].transpose(1, 2)
            grad_scores[:, :, k] = torch.einsum("bpo,bpmo->bpm", given, difference)
            product = torch.einsum("bpm,bpo->bpmo", scores[:, :, k], given).flatten(0, 1).flatten(1)
            grad_points += sum_rows(product, rows, total)
            grad_centers -= sum_rows(product, middle, total)
        return grad_scores, grad_points.view(points.shape), grad_centers.view(centers.shape), None


def _differences(points: Tensor, centers: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbour k of every center less the center ``(B, P, M, O)``, and the rows of both, -1 where one is missing."""
    clouds, count = points.shape[:2]
    other, middle = index[..., k], index[..., 0]
    there = (other >= 0) & (other < count) & (middle >= 0) & (middle < count)
    first = torch.arange(clouds, device=index.device).unsqueeze(1) * count
    rows, middles = (torch.where(there, each + first, -1).flatten() for each in (other, middle))
    if not count:
        return points.new_zeros((*other.shape, *points.shape[2:])), rows, middles
    near, at = (each.flatten(0, 1)[row.clamp(min=0)] for each, row in ((points, rows), (centers, middles)))
    found = torch.where(there.flatten()[:, None, None], near - at, 0)
    return found.unflatten(0, other.shape), rows, middles
