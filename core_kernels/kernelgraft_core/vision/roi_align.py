"""RoIAlign (Mask R-CNN, arXiv 1703.06870): the mean or the largest of samples in each bin of upright boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import wide
from .rois import as_maps, as_sums, check_rois, check_rois_of
from .segments import segment_argmax
from .separable import sampled_axis, separable_taps
from .taps import (
    TAPS_AT_ONCE,
    Taps,
    add_at,
    bordered_corners,
    check_samples,
    counted,
    gather,
    grids,
    pixel_table,
    portions,
    regular,
    scatter,
    weighted_rows,
)

_WEIGHTS_AT_ONCE = 1 << 24


def roi_align(
    x: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """The mean over evenly spaced samples of each bin.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        rois: ``(R, 5)``, number of the image, then x1, y1, x2, y2 in pixels of the input image; not differentiated.
        output_size: bins of each box, ``(h, w)``.
        spatial_scale: pixels of ``x`` per pixel of the input image.
        sampling_ratio: samples of a bin along each axis; 0 for one a pixel.
        aligned: pixel centres are half a pixel from the corner. False: they are the corner, and boxes are at least one
            pixel wide, as in older detectors.

    Returns:
        ``(R, C, h, w)``, dtype of ``x``. Bins of boxes without extent, infinite or NaN are zero.

    Raises:
        ValueError: a shape, dtype or device is wrong, or, on a CPU, an image is not there.
    """
    check_rois(x, rois, 5, output_size)
    taps = _taps(rois.detach().to(wide(x)), x.shape, output_size, spatial_scale, sampling_ratio, aligned)
    return as_maps(gather(x, taps), len(rois), output_size, x.dtype)


def roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    shape: torch.Size | tuple[int, ...],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of :func:`roi_align`, ``(R, C, h, w)``."""
    output_size = (grad.shape[2], grad.shape[3])
    check_rois_of(grad, rois, 5, shape, output_size)
    taps = _taps(rois.detach().to(wide(grad)), shape, output_size, spatial_scale, sampling_ratio, aligned)
    return scatter(as_sums(grad), taps, shape).to(grad.dtype)


def roi_align_max(
    x: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest sample of each bin instead of their mean; the first of equal ones.

    Arguments as for :func:`roi_align`; not differentiable, see :func:`roi_align_max_backward`.

    Returns:
        ``(R, C, h, w)``, and the samples' y and x in pixels of ``x``. A bin without samples is the smallest float32,
        and y and x are -1.

    Raises:
        ValueError: as :func:`roi_align`, or a bin asks for more than 2^22 samples.
    """
    check_rois(x, rois, 5, output_size)
    start, size = _boxes(rois.detach().to(wide(x)), spatial_scale, aligned)
    bins = torch.tensor(output_size, device=x.device)
    counts = torch.stack([counted(size[:, axis] / bins[axis], sampling_ratio) for axis in (0, 1)], 1)
    check_samples(counts[:, 0], counts[:, 1])
    table, per_box = pixel_table(x.detach()), output_size[0] * output_size[1]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    channels = max(1, x.shape[1])
    for part in portions(counts.prod(1) * per_box, 8 * TAPS_AT_ONCE // channels):
        each = torch.arange(per_box, device=x.device).repeat(len(counts[part]))
        box = torch.arange(len(counts), device=x.device)[part].repeat_interleave(per_box)
        places = grids(counts[box, 0], counts[box, 1])
        box, each = box[places.bins], each[places.bins]
        numbers = (each // output_size[1], each % output_size[1])
        shares = places.shares(box, counts[:, 0], counts[:, 1])
        y, x_ = (
            start[box, i] + (numbers[i] + shares[i]).to(start.dtype) * (size[box, i] / output_size[i]) for i in (0, 1)
        )
        values = weighted_rows(table, regular(*bordered_corners(rois[box, 0].long(), y, x_, x.shape)))
        best, row = segment_argmax(values, places.bins, len(places.starts) - 1)
        none = row < 0
        at = row.clamp(min=0)
        if not len(y):
            y, x_ = y.new_zeros(1), x_.new_zeros(1)
        found.append((best, y[at].masked_fill(none, -1), x_[at].masked_fill(none, -1)))
    empty = table.new_zeros((0, x.shape[1]))
    sums = [torch.cat([empty, *(part[i] for part in found)]) for i in range(3)]
    out, at_y, at_x = (as_maps(each, len(rois), output_size, x.dtype) for each in sums)
    return out, at_y, at_x


def roi_align_max_backward(
    grad: Tensor, rois: Tensor, at_y: Tensor, at_x: Tensor, shape: torch.Size | tuple[int, ...]
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of :func:`roi_align_max`, ``(R, C, h, w)``."""
    check_rois_of(grad, rois, 5, shape, (grad.shape[2], grad.shape[3]))
    channels = shape[1]
    # Every channel has positions of its own: each is a feature map of one channel.
    maps = rois[:, 0].long().unsqueeze(1) * channels + torch.arange(channels, device=grad.device)
    images = maps.view(*maps.shape, 1, 1).expand_as(grad).flatten()
    flat = (shape[0] * channels, 1, *shape[2:])
    y, x, grads = (each.to(wide(grad)).flatten() for each in (at_y, at_x, grad))
    y = torch.where((y == -1) & (x == -1), torch.nan, y)  # no sample was the largest
    total: Tensor | None = None
    for part in (slice(i, i + TAPS_AT_ONCE // 4) for i in range(0, max(1, len(y)), TAPS_AT_ONCE // 4)):
        pixels, weights = bordered_corners(images[part], y[part], x[part], flat)
        found = add_at(math.prod(shape) + 1, pixels, weights * grads[part, None])
        total = found if total is None else total.add_(found)
    assert total is not None
    return total[:-1].view(tuple(shape)).to(grad.dtype)


def _boxes(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Where boxes begin, and their extent, both ``(R, 2)``, y first."""
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, size = corners[:, [1, 0]], (corners[:, 2:] - corners[:, :2])[:, [1, 0]]
    return start, size if aligned else size.clamp(min=1)


def _taps(
    rois: Tensor,
    shape: torch.Size | tuple[int, ...],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> list[Taps]:
    start, size = _boxes(rois, spatial_scale, aligned)
    at_once = max(1, _WEIGHTS_AT_ONCE // (output_size[0] * shape[2] + output_size[1] * shape[3]))

    def parts() -> Iterator[Taps]:
        for first in range(0, len(rois), at_once):
            part = slice(first, first + at_once)
            rows, columns = (
                sampled_axis(start[part, i], size[part, i], output_size[i], sampling_ratio, shape[2 + i])
                for i in (0, 1)
            )
            yield from separable_taps(rois[part, 0].long(), rows, columns, shape)

    return list(parts())
