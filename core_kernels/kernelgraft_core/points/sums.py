"""Sums of rows and numbers that share an index, in an order that neither threads nor a GPU decide."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core.points.reduce.ops import members_of, reduce_groups


def sum_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """``out[index[k]] += values[k]`` of ``values (K, C)``: ``(rows, C)``; rows with a negative index are left out."""
    return reduce_groups(values, *members_of(index, rows), "sum")


def sum_numbers(values: Tensor, index: Tensor, size: int) -> Tensor:
    """``out[index[k]] += values[k]`` of ``values (K,)``: ``(size,)``."""
    found = values.new_zeros(size)
    if values.device.type == "cpu":
        return found.index_add(0, index, values)  # one thread; index_put would add with several
    return found.index_put((index,), values, accumulate=True)  # sorts first; index_add would be atomic
