"""Columns of a convolution at a few places of an image, and their results put back (masked convolution)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_im2col(
    x: Tensor, rows: Tensor, columns: Tensor, kernel_size: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """What a convolution of stride 1 reads at some places.

    Args:
        x: ``(1, C, H, W)``, zero outside.
        rows, columns: int64 ``(P,)`` places of the output.
        kernel_size, padding: ``(y, x)``.

    Returns:
        ``(C * kernel height * kernel width, P)``, dtype of ``x``. Differentiable.
    """
    if x.dim() != 4 or len(x) != 1 or rows.shape != columns.shape or rows.dim() != 1:
        raise ValueError(f"x is {tuple(x.shape)}, places {tuple(rows.shape)} and {tuple(columns.shape)}")
    padded = F.pad(x[0], (padding[1], padding[1] + kernel_size[1], padding[0], padding[0] + kernel_size[0]))
    down = torch.arange(kernel_size[0], device=x.device).view(-1, 1, 1)
    across = torch.arange(kernel_size[1], device=x.device).view(-1, 1)
    return padded[:, rows + down, columns + across].flatten(0, 2)


def masked_col2im(values: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """Write ``values (C, P)`` to ``out (1, C, H, W)`` at some places; the rest stays as it is."""
    out[0, :, rows, columns] = values.to(out.dtype)
