"""What all RoI pooling has in common: boxes checked, and results laid out."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rois(x: Tensor, rois: Tensor, columns: int, output_size: tuple[int, int]) -> None:
    """Raises:
    ValueError: x is no ``(N, C, H, W)`` of floats, rois no ``(R, columns)`` on its device, or, on a CPU, a RoI is on an
        image that is not there: asking a GPU would mean to wait for it.
    """
    check_rois_of(x, rois, columns, x.shape, output_size)


def check_rois_of(
    x: Tensor, rois: Tensor, columns: int, shape: tuple[int, ...] | torch.Size, output_size: tuple[int, int]
) -> None:
    """:func:`check_rois` for a gradient ``x`` of something that was pooled from feature maps of ``shape``."""
    if x.dtype not in FLOATS or x.dim() != 4 or len(shape) != 4:
        raise ValueError(f"the feature map is {x.dtype} {tuple(x.shape)}, expected floating point (N, C, H, W)")
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"the feature map is {tuple(shape)}, expected at least one pixel")
    if rois.dim() != 2 or rois.shape[1] != columns or not rois.is_floating_point():
        raise ValueError(f"rois is {rois.dtype} {tuple(rois.shape)}, expected floating point (R, {columns})")
    if rois.device != x.device:
        raise ValueError(f"rois is on {rois.device}, the feature map on {x.device}")
    if min(output_size) < 1:
        raise ValueError(f"output_size is {tuple(output_size)}, expected at least 1 each")
    if rois.device.type == "cpu" and len(rois):
        low, high = rois[:, 0].long().aminmax()
        if low < 0 or high >= shape[0]:
            raise ValueError(f"rois are on images {int(low)} to {int(high)}, there are {shape[0]}")


def as_maps(sums: Tensor, rois: int, output_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sums ``(R * h * w, C)`` as ``(R, C, h, w)``."""
    maps = sums.view(rois, *output_size, sums.shape[1]).permute(0, 3, 1, 2)
    return maps.to(dtype).contiguous()


def as_sums(grad: Tensor) -> Tensor:
    """The way back."""
    return grad.permute(0, 2, 3, 1).flatten(0, 2)
