"""RoI pooling (Fast R-CNN, arXiv 1504.08083): the largest pixel of each bin of upright boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import wide
from .rois import as_maps, check_rois, check_rois_of
from .segments import segment_argmax
from .taps import TAPS_AT_ONCE, add_at, grids, pixel_table, portions


def roi_pool(
    x: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The largest pixel of each bin, bins rounded outwards to whole pixels; the first of equal ones.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64.
        rois: ``(R, 5)``, number of the image, then x1, y1, x2, y2 in pixels of the input image, the last ones included.
        output_size: bins of each box, ``(h, w)``.
        spatial_scale: pixels of ``x`` per pixel of the input image.

    Returns:
        ``(R, C, h, w)``, dtype of ``x``, zero for bins outside of the image and boxes without extent; and int32 pixels
        ``y * W + x``, -1 where there is none. Not differentiable: see :func:`roi_pool_backward`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or, on a CPU, an image is not there.
    """
    check_rois(x, rois, 5, output_size)
    height, width = x.shape[2:]
    first_y, last_y, first_x, last_x = _bounds(rois.detach().to(wide(x)), (height, width), output_size, spatial_scale)
    high, broad = last_y - first_y, last_x - first_x
    images = rois[:, 0].long().repeat_interleave(output_size[0] * output_size[1])
    table = pixel_table(x.detach())
    sums, pixels = [table.new_zeros((0, x.shape[1]))], [images.new_zeros((0, x.shape[1]))]
    for part in portions(high * broad, 8 * TAPS_AT_ONCE // max(1, x.shape[1])):
        inside = grids(high[part], broad[part])
        bins = inside.bins + part.start
        place = (first_y[bins] + inside.rows) * width + first_x[bins] + inside.columns
        values = table[images[bins] * height * width + place]
        best, row = segment_argmax(values, inside.bins, len(high[part]))
        none = row < 0
        place = place if len(place) else place.new_zeros(1)
        empty = (high[part] * broad[part] == 0).unsqueeze(1)
        sums.append(best.masked_fill(empty, 0))
        pixels.append(place[row.clamp(min=0)].masked_fill(none, -1))
    out = as_maps(torch.cat(sums), len(rois), output_size, x.dtype)
    return out, as_maps(torch.cat(pixels), len(rois), output_size, torch.int32)


def roi_pool_backward(grad: Tensor, rois: Tensor, pixels: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The gradient of ``x``, of that shape, from that of the first result of :func:`roi_pool` and its second."""
    check_rois_of(grad, rois, 5, shape, (grad.shape[2], grad.shape[3]))
    channels, area = shape[1], shape[2] * shape[3]
    maps = rois[:, 0].long().unsqueeze(1) * channels + torch.arange(channels, device=grad.device)
    there = pixels >= 0
    places = (maps.view(*maps.shape, 1, 1) * area + pixels)[there]
    total = add_at(shape[0] * channels * area, places, grad[there].to(wide(grad)))
    return total.view(tuple(shape)).to(grad.dtype)


def _bounds(
    rois: Tensor, sizes: tuple[int, int], output_size: tuple[int, int], spatial_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last row, and column, of each bin, the last one not included; int64 ``(R * h * w,)``."""
    first = rois[:, [2, 1]] * spatial_scale
    extent = (rois[:, [4, 3]] + 1) * spatial_scale - first
    usable = (extent > 0).all(1) & first.isfinite().all(1) & extent.isfinite().all(1)
    bounds: list[Tensor] = []
    for axis in (0, 1):
        bins = torch.arange(output_size[axis] + 1, device=rois.device, dtype=rois.dtype)
        edges = bins * (extent[:, axis : axis + 1] / output_size[axis]) + first[:, axis : axis + 1]
        edges = torch.where(usable.unsqueeze(1), edges, 0)
        low, high = edges[:, :-1].floor(), edges[:, 1:].ceil()
        high = torch.where(usable.unsqueeze(1), high, low)
        low, high = (each.clamp(0, sizes[axis]).long() for each in (low, high))
        high = torch.maximum(low, high)
        shape = (len(rois), output_size[0], output_size[1])
        for each in (low, high):
            bounds.append((each.unsqueeze(2) if axis == 0 else each.unsqueeze(1)).expand(shape).flatten())
    first_y, last_y, first_x, last_x = bounds
    return first_y, last_y, first_x, last_x
