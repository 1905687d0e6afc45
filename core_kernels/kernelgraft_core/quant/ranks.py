"""Calibration over several processes: each holds samples of its own, all decide alike because sums are shared."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def rank() -> int:
    """This process among those that calibrate together; 0 when it is alone."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes calibrate together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; the tensor itself when there is one rank."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """Maximum over all ranks, in place; the tensor itself when there is one rank."""
    if world_size() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return tensor


def all_sum_float(value: float) -> float:
    """Sum of a number over all ranks."""
    return float(all_sum(torch.tensor(value, dtype=torch.float64))) if world_size() > 1 else value
