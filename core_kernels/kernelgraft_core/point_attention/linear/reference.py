"""The plainest linear layer of rows. Any device, any float type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)
