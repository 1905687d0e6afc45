"""Deformable RoI pooling (arXiv 1703.06211, 1811.11168): RoIAlign whose bins are moved by learned offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import wide
from .rois import as_maps, check_rois
from .taps import Taps, counted, gather, mean_of_grids


def deform_roi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """The mean over evenly spaced samples of bins that are moved.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        rois: ``(R, 5)``, number of the image, then x1, y1, x2, y2 in pixels of the input image; not differentiated.
        offset: ``(R, 2, h, w)`` how far each bin is moved to the right and down, in units of ``gamma`` times the
            extent of its box; None for not at all.
        output_size: bins of each box, ``(h, w)``.
        spatial_scale: pixels of ``x`` per pixel of the input image.
        sampling_ratio: samples of a bin along each axis; 0 for one a pixel.

    Returns:
        ``(R, C, h, w)``, dtype of ``x``. Differentiable in ``x`` and ``offset``.

    Raises:
        ValueError: a shape, dtype or device is wrong, a bin asks for more than 2^22 samples, or, on a CPU, an image is
            not there.
    """
    check_rois(x, rois, 5, output_size)
    if offset is not None and (offset.shape != (len(rois), 2, *output_size) or offset.device != x.device):
        raise ValueError(
            f"offset is {tuple(offset.shape)} on {offset.device}, expected {(len(rois), 2, *output_size)} on {x.device}"
        )
    dtype = wide(x)
    moved = None if offset is None else offset.to(dtype)
    taps = _taps(rois.detach().to(dtype), moved, x.shape, output_size, spatial_scale, sampling_ratio, gamma)
    return as_maps(gather(x, taps), len(rois), output_size, x.dtype)


def _taps(
    rois: Tensor,
    offset: Tensor | None,
    shape: torch.Size,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> list[Taps]:
    high, broad = output_size
    usable = rois.isfinite().all(1)
    rois = torch.where(usable.unsqueeze(1), rois, 0)
    corners = rois[:, 1:] * spatial_scale - 0.5
    start, size = corners[:, [1, 0]], (corners[:, 2:] - corners[:, :2])[:, [1, 0]]
    boxes = torch.arange(len(rois), device=rois.device).repeat_interleave(high * broad)
    each = torch.arange(high * broad, device=rois.device).repeat(len(rois))
    counts = [counted(size[:, i] / output_size[i], sampling_ratio) * usable for i in (0, 1)]
    begins = start[boxes]
    if offset is not None:
        begins = begins + gamma * size[boxes] * offset.permute(0, 2, 3, 1).flatten(0, 2).flip(1)

    def position(bins: Tensor, down: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        box = boxes[bins]
        y = begins[bins, 0] + size[box, 0] * ((each[bins] // broad + down) / high).to(size.dtype)
        x = begins[bins, 1] + size[box, 1] * ((each[bins] % broad + across) / broad).to(size.dtype)
        return y, x

    return mean_of_grids(rois[boxes, 0].long(), counts[0][boxes], counts[1][boxes], position, shape)
