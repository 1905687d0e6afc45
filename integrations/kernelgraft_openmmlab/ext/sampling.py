"""Furthest point sampling, and gathering what was sampled."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.points.grouping import gather_points, gathered_gradient
from kernelgraft_core.points.sampling import ops as core

__all__ = (
    "furthest_point_sampling_forward",
    "furthest_point_sampling_with_dist_forward",
    "gather_points_backward",
    "gather_points_forward",
)


def furthest_point_sampling_forward(
    points_tensor: Tensor, temp_tensor: Tensor, idx_tensor: Tensor, b: int, n: int, m: int
) -> None:
    order = _order_of_ties(n).to(points_tensor.device)
    _sample(core.furthest_point_sampling, points_tensor[:, order], temp_tensor, idx_tensor, order)


def furthest_point_sampling_with_dist_forward(
    points_tensor: Tensor, temp_tensor: Tensor, idx_tensor: Tensor, b: int, n: int, m: int
) -> None:
    order = _order_of_ties(n).to(points_tensor.device)
    ordered = points_tensor[:, order.unsqueeze(1), order]
    _sample(core.furthest_point_sampling_with_distances, ordered, temp_tensor, idx_tensor, order)


def _sample(sample: Any, values: Tensor, temp: Tensor, index: Tensor, order: Tensor) -> None:
    nearest = temp[:, order].to(torch.promote_types(values.dtype, torch.float32))
    found, nearest = sample(values, index.shape[1], nearest)
    index.copy_(order[found.long()])
    temp[:, order] = nearest.to(temp.dtype)


@functools.lru_cache(maxsize=64)
def _order_of_ties(points: int) -> Tensor:
    """Points in the order in which mmcv's kernel prefers them when they are equally far.

    Thread ``t`` of up to 1024 looks at the points ``t``, ``t + threads``, ..., and of two threads that are compared, in
    halves, quarters and so on, the lower one wins: threads rank by their bits, read backwards.
    """
    threads = max(min(1 << int(math.log(points) / math.log(2)), 1024), 1) if points else 1
    bits = threads.bit_length() - 1
    thread = torch.arange(points) % threads
    rank = torch.zeros_like(thread)
    for bit in range(bits):
        rank |= ((thread >> bit) & 1) << (bits - 1 - bit)
    return rank.argsort(stable=True)


def gather_points_forward(points_tensor: Tensor, idx_tensor: Tensor, out_tensor: Tensor, **_: int) -> None:
    if out_tensor.numel():
        out_tensor.copy_(gather_points(points_tensor, idx_tensor))


def gather_points_backward(grad_out_tensor: Tensor, idx_tensor: Tensor, grad_points_tensor: Tensor, **_: int) -> None:
    if grad_points_tensor.numel():
        points = grad_points_tensor.shape[2]
        grad_points_tensor.copy_(gathered_gradient(grad_out_tensor, idx_tensor.long(), points))
