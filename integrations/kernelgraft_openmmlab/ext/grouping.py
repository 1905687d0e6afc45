"""Neighbours, and features of points by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.points import grouping as core
from kernelgraft_core.points.neighbors import ops as neighbors
from kernelgraft_core.points.sums import sum_rows

__all__ = (
    "assign_score_withk_backward",
    "assign_score_withk_forward",
    "ball_query_forward",
    "chamfer_distance_backward",
    "chamfer_distance_forward",
    "group_points_backward",
    "group_points_forward",
    "knn_forward",
    "stack_ball_query_forward",
    "stack_group_points_backward",
    "stack_group_points_forward",
    "three_interpolate_backward",
    "three_interpolate_forward",
    "three_nn_forward",
)

_FAR = 1e10  # squared; mmcv takes what is no nearer for nothing


def ball_query_forward(
    new_xyz_tensor: Tensor,
    xyz_tensor: Tensor,
    idx_tensor: Tensor,
    b: int,
    n: int,
    m: int,
    min_radius: float,
    max_radius: float,
    nsample: int,
) -> None:
    """Where nothing is near, ``idx_tensor`` stays as it is."""
    found = neighbors.ball_query(xyz_tensor, new_xyz_tensor, max_radius, nsample, min_radius)
    idx_tensor.copy_(torch.where(found < 0, idx_tensor, found))


def stack_ball_query_forward(
    new_xyz_tensor: Tensor,
    new_xyz_batch_cnt: Tensor,
    xyz_tensor: Tensor,
    xyz_batch_cnt: Tensor,
    idx_tensor: Tensor,
    max_radius: float,
    nsample: int,
) -> None:
    """Where nothing is near, the first number is -1 and the others stay as they are."""
    found = torch.full_like(idx_tensor, -1)
    if max_radius > 0:
        found = neighbors.ball_query(
            xyz_tensor, new_xyz_tensor, max_radius, nsample, 0.0, xyz_batch_cnt, new_xyz_batch_cnt
        )
    idx_tensor.copy_(torch.where(found < 0, idx_tensor, found))
    idx_tensor[:, 0] = found[:, 0]


def knn_forward(
    xyz_tensor: Tensor,
    new_xyz_tensor: Tensor,
    idx_tensor: Tensor,
    dist2_tensor: Tensor,
    b: int,
    n: int,
    m: int,
    nsample: int,
) -> None:
    """Equally far ones come in the order of their numbers, which mmcv's heap leaves open."""
    found, squares = neighbors.knn(xyz_tensor, new_xyz_tensor, nsample)
    near = squares < _FAR
    idx_tensor.copy_(torch.where(near, found, 0))
    dist2_tensor.copy_(torch.where(near, squares, _FAR))


def three_nn_forward(
    unknown_tensor: Tensor, known_tensor: Tensor, dist2_tensor: Tensor, idx_tensor: Tensor, b: int, n: int, m: int
) -> None:
    squares, found = neighbors.three_nn(unknown_tensor, known_tensor)
    idx_tensor.copy_(found.clamp(min=0))
    dist2_tensor.copy_(squares.double().clamp(max=1e40))  # what mmcv begins with, infinity in float32


def three_interpolate_forward(
    points_tensor: Tensor, idx_tensor: Tensor, weight_tensor: Tensor, out_tensor: Tensor, **_: int
) -> None:
    if out_tensor.numel():
        out_tensor.copy_(core.three_interpolate(points_tensor, idx_tensor, weight_tensor))


def three_interpolate_backward(
    grad_out_tensor: Tensor, idx_tensor: Tensor, weight_tensor: Tensor, grad_points_tensor: Tensor, **_: int
) -> None:
    if grad_points_tensor.numel():
        shares = (grad_out_tensor.unsqueeze(3) * weight_tensor.unsqueeze(1)).flatten(2)
        points = grad_points_tensor.shape[2]
        grad_points_tensor.copy_(core.gathered_gradient(shares, idx_tensor.long().flatten(1), points))


def group_points_forward(points_tensor: Tensor, idx_tensor: Tensor, out_tensor: Tensor, **_: int) -> None:
    if out_tensor.numel():
        out_tensor.copy_(core.gather_points(points_tensor, idx_tensor))


def group_points_backward(grad_out_tensor: Tensor, idx_tensor: Tensor, grad_points_tensor: Tensor, **_: int) -> None:
    if grad_points_tensor.numel():
        index, points = idx_tensor.long().flatten(1), grad_points_tensor.shape[2]
        grad_points_tensor.copy_(core.gathered_gradient(grad_out_tensor.flatten(2), index, points))


def stack_group_points_forward(
    features_tensor: Tensor,
    features_batch_cnt_tensor: Tensor,
    idx_tensor: Tensor,
    idx_batch_cnt_tensor: Tensor,
    out_tensor: Tensor,
    **_: int,
) -> None:
    """What is no number of a point of its cloud gives 0; mmcv reads whatever lies there."""
    out_tensor.copy_(
        core.group_stacked_points(features_tensor, idx_tensor, features_batch_cnt_tensor, idx_batch_cnt_tensor)
    )


def stack_group_points_backward(
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    idx_batch_cnt_tensor: Tensor,
    features_batch_cnt_tensor: Tensor,
    grad_features_tensor: Tensor,
    **_: int,
) -> None:
    rows = core.stacked_rows(idx_tensor, features_batch_cnt_tensor, idx_batch_cnt_tensor).flatten()
    grad = grad_out_tensor.transpose(1, 2).flatten(0, 1)
    grad_features_tensor.copy_(sum_rows(grad, rows, len(grad_features_tensor)))


def chamfer_distance_forward(
    xyz1: Tensor, xyz2: Tensor, dist1: Tensor, dist2: Tensor, idx1: Tensor, idx2: Tensor
) -> None:
    if not (xyz1.numel() and xyz2.numel()):
        return
    there, back, rows, back_rows = core.chamfer_distance(xyz1.detach(), xyz2.detach())
    for squares, found, distance, index in ((there, rows, dist1, idx1), (back, back_rows, dist2, idx2)):
        distance.copy_(torch.where(found < 0, _FAR, squares))
        index.copy_(found.clamp(min=0))


def chamfer_distance_backward(
    xyz1: Tensor,
    xyz2: Tensor,
    idx1: Tensor,
    idx2: Tensor,
    graddist1: Tensor,
    graddist2: Tensor,
    gradxyz1: Tensor,
    gradxyz2: Tensor,
) -> None:
    if not (xyz1.numel() and xyz2.numel()):
        return
    for x, y, index, grad, grad_x, grad_y in (
        (xyz1, xyz2, idx1, graddist1, gradxyz1, gradxyz2),
        (xyz2, xyz1, idx2, graddist2, gradxyz2, gradxyz1),
    ):
        rows = index.long()
        near = y.gather(1, rows.unsqueeze(2).expand(-1, -1, y.shape[2]))
        share = (x - near) * (2 * grad).unsqueeze(2)
        grad_x += share
        grad_y -= core.gathered_gradient(share.transpose(1, 2), rows, y.shape[1]).transpose(1, 2)


def assign_score_withk_forward(
    points: Tensor,
    centers: Tensor,
    scores: Tensor,
    knn_idx: Tensor,
    output: Tensor,
    B: int,
    N0: int,
    N1: int,
    M: int,
    K: int,
    O: int,  # noqa: E741
    aggregate: int,
) -> None:
    """mmcv's kernels sum, whatever ``aggregate`` says."""
    output.copy_(core.assign_scores(scores, points, centers, knn_idx))


def assign_score_withk_backward(
    grad_out: Tensor,
    points: Tensor,
    centers: Tensor,
    scores: Tensor,
    knn_idx: Tensor,
    grad_points: Tensor,
    grad_centers: Tensor,
    grad_scores: Tensor,
    B: int,
    N0: int,
    N1: int,
    M: int,
    K: int,
    O: int,  # noqa: E741
    aggregate: int,
) -> None:
    with torch.enable_grad():
        leaves = tuple(each.detach().requires_grad_() for each in (scores, points, centers))
        again = core.assign_scores(leaves[0], leaves[1], leaves[2], knn_idx)
        found = torch.autograd.grad(again, leaves, grad_out)
    for target, each in zip((grad_scores, grad_points, grad_centers), found, strict=True):
        target.copy_(each)
