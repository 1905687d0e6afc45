"""The plainest correct pair of normalizations with a feed-forward network between them. Any device, any float type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_ffn(
    x: Tensor,
    update: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float,
) -> Tensor:
    dtype, shape = x.dtype, x.shape[1:]
    wide = torch.promote_types(dtype, torch.float32)
    x, update, norm1_weight, norm1_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm2_weight, norm2_bias = (
        each.to(wide)
        for each in (x, update, norm1_weight, norm1_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm2_weight,
                     norm2_bias)
    )  # fmt: skip
    hidden = F.layer_norm(x + update, shape, norm1_weight, norm1_bias, eps)
    inner = F.linear(F.gelu(F.linear(hidden, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return F.layer_norm(hidden + inner, shape, norm2_weight, norm2_bias, eps).to(dtype)
