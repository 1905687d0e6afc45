"""The plainest correct reduction of groups of rows, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def points_reduce(feats: Tensor, order: Tensor, starts: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    groups, channels = len(starts) - 1, feats.shape[1]
    wide = torch.promote_types(feats.dtype, torch.float32)
    order, counts = order[int(starts[0]) : int(starts[-1])], starts.diff()
    values = feats[order].to(wide)
    group = torch.arange(groups, device=feats.device).repeat_interleave(counts)
    if reduce != "max":
        # Sums in a settled order on a GPU as well, where those of index_add are not.
        total = values.new_zeros((groups, channels)).index_put((group,), values, accumulate=True)
        if reduce == "mean":
            total = total / counts.clamp(min=1).unsqueeze(1)
        return total.to(feats.dtype), order.new_empty(0)
    index = group.unsqueeze(1).expand(-1, channels)
    known = torch.where(values.isnan(), -torch.inf, values)
    best = values.new_full((groups, channels), -torch.inf).scatter_reduce(0, index, known, "amax")
    # The lowest row of those that have it.
    rows = torch.where(values == best[group], order.unsqueeze(1), len(feats))
    source = order.new_full((groups, channels), len(feats)).scatter_reduce(0, index, rows, "amin")
    return best.to(feats.dtype), torch.where(source == len(feats), -1, source)
