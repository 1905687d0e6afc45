"""From rows of features to a dense picture seen from above."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bev(feats: Tensor, coords: Tensor, batch_size: int, shape: tuple[int, int]) -> Tensor:
    """Features ``(N, C)`` put where their coordinates say, zeros elsewhere: ``(batch_size, C, H, W)``.

    Args:
        feats: any dtype; differentiable.
        coords: int32 or int64 ``(N, 4)``, rows (sample, z, y, x); z is not looked at, and no two rows may have the same
            sample, y and x.
        shape: ``(H, W)``.

    Raises:
        ValueError: coords has another shape, or (looked at on a CPU only) lies outside.
    """
    if coords.dim() != 2 or coords.shape[1] != 4 or coords.shape[0] != feats.shape[0] or coords.is_floating_point():
        raise ValueError(f"coords is {coords.dtype} {tuple(coords.shape)}, expected integers ({feats.shape[0]}, 4)")
    high, wide = shape
    sample, _, y, x = coords.long().unbind(1)
    if coords.device.type == "cpu" and not torch.compiler.is_compiling() and len(coords):
        for name, values, limit in (("sample", sample, batch_size), ("y", y, high), ("x", x, wide)):
            low, top = (int(each) for each in values.aminmax())
            if low < 0 or top >= limit:
                raise ValueError(f"{name} of coords goes from {low} to {top}, expected 0 to {limit - 1}")
    canvas = feats.new_zeros((batch_size * high * wide, feats.shape[1]))
    canvas = canvas.index_put(((sample * high + y) * wide + x,), feats)
    return canvas.view(batch_size, high, wide, feats.shape[1]).permute(0, 3, 1, 2).contiguous()
