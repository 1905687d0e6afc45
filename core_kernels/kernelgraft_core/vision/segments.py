"""The largest of each segment of values."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_argmax(values: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest value of each segment and channel, and the first row that holds it.

    NaN is never the largest, and neither is what is not above the smallest float32: the result is that number and -1
    then, as for an empty segment.

    Args:
        values: ``(T, C)``, fewer than 2^31 rows.
        segments: int64 ``(T,)``.

    Returns:
        ``(count, C)`` of the dtype of ``values``, and int64 rows ``(count, C)``.
    """
    smallest = torch.finfo(torch.float32).min
    usable = values.nan_to_num(smallest, float("inf"), float("-inf"))
    where = segments.unsqueeze(1).expand_as(values)
    best = values.new_full((count, values.shape[1]), smallest).scatter_reduce(0, where, usable, "amax")
    held = (usable == best[segments]) & (usable > smallest)
    row = torch.arange(len(values), device=values.device, dtype=torch.int32).unsqueeze(1).expand_as(values)
    none = torch.iinfo(row.dtype).max
    first = row.new_full(best.shape, none).scatter_reduce(0, where, torch.where(held, row, none), "amin")
    return best, torch.where(first == none, -1, first).long()
