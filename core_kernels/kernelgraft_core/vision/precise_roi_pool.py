"""Precise RoI pooling (IoU-Net, arXiv 1807.11590): the integral of the interpolated feature map over each bin."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import wide
from .rois import as_maps, as_sums, check_rois, check_rois_of
from .separable import separable_taps
from .taps import Taps, gather, scatter

_WEIGHTS_AT_ONCE = 1 << 24


def prroi_pool(x: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """The mean of the bilinear interpolation of ``x`` over each bin, zero outside of it.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        rois: ``(R, 5)``, number of the image, then x1, y1, x2, y2 in pixels of the input image.
        output_size: bins of each box, ``(h, w)``.
        spatial_scale: pixels of ``x`` per pixel of the input image.

    Returns:
        ``(R, C, h, w)``, dtype of ``x``; zero for boxes without extent. Differentiable in ``x`` and ``rois``.

    Raises:
        ValueError: a shape, dtype or device is wrong, or, on a CPU, an image is not there.
    """
    check_rois(x, rois, 5, output_size)
    return as_maps(
        gather(x, _taps(rois.to(wide(x)), x.shape, output_size, spatial_scale)), len(rois), output_size, x.dtype
    )


def prroi_pool_backward(
    grad: Tensor, rois: Tensor, shape: torch.Size | tuple[int, ...], spatial_scale: float = 1.0
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of :func:`prroi_pool`, ``(R, C, h, w)``."""
    output_size = (grad.shape[2], grad.shape[3])
    check_rois_of(grad, rois, 5, shape, output_size)
    return scatter(as_sums(grad), _taps(rois.to(wide(grad)), shape, output_size, spatial_scale), shape).to(grad.dtype)


def _taps(
    rois: Tensor, shape: torch.Size | tuple[int, ...], output_size: tuple[int, int], spatial_scale: float
) -> list[Taps]:
    at_once = max(1, _WEIGHTS_AT_ONCE // (output_size[0] * shape[2] + output_size[1] * shape[3]))
    taps: list[Taps] = []
    for first in range(0, len(rois), at_once):
        part = rois[first : first + at_once]
        corners = part[:, 1:] * spatial_scale
        usable = (corners[:, 2:] > corners[:, :2]).all(1) & corners.isfinite().all(1)
        rows, columns = (
            _integrals(corners[:, 1 - i], corners[:, 3 - i], usable, output_size[i], shape[2 + i]) for i in (0, 1)
        )
        taps += separable_taps(part[:, 0].detach().long(), rows, columns, shape)
    return taps


def _integrals(first: Tensor, last: Tensor, usable: Tensor, bins: int, pixels: int) -> Tensor:
    """Weights ``(R, bins, pixels)`` of the mean over each bin of the interpolation along an axis."""
    first, last = torch.where(usable, first, 0), torch.where(usable, last, 1)
    edges = torch.arange(bins + 1, device=first.device, dtype=first.dtype)
    edges = first.unsqueeze(1) + edges * ((last - first) / bins).unsqueeze(1)
    # A pixel's share rises to 1 at its centre and falls again: the integral of this up to each edge.
    distance = (edges.unsqueeze(2) - torch.arange(pixels, device=first.device)).clamp(-1, 1)
    below = torch.where(distance < 0, (1 + distance) ** 2 / 2, 1 - (1 - distance) ** 2 / 2)
    weights = below.diff(dim=1) / ((last - first) / bins).view(-1, 1, 1)
    return torch.where(usable.view(-1, 1, 1), weights, 0)
