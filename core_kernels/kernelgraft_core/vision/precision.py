"""In which dtype sums are made, whatever autocast is set to."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` are made in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(x: Tensor) -> torch.autocast:
    """Inside, autocast does not narrow the convolutions and products that an op is made of."""
    return torch.autocast(x.device.type, enabled=False)
