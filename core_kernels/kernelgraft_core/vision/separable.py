"""Taps of bins whose weights are the product of one vector of weights along each axis: of upright boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernelgraft_core.sparse.grids import starts_of

from .taps import TAPS_AT_ONCE, Taps, counted, grids, portions


def separable_taps(images: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> list[Taps]:
    """Taps of ``R * P * Q`` bins, where the pixel ``(i, j)`` weighs ``rows[r, p, i] * columns[r, q, j]``.

    Pixels that two samples of a bin share are read once, a quarter of what sampling four corners each reads.

    Args:
        images: int64 ``(R,)`` which feature map each box is on.
        rows: ``(R, P, H)``.
        columns: ``(R, Q, W)``.
        shape: of the feature maps, ``(N, C, H, W)``.

    Returns:
        Of one part of the boxes after another. Weights are differentiable in ``rows`` and ``columns``.
    """
    high, broad = ((axis.detach() != 0).sum(2) for axis in (rows, columns))
    parts = portions(high.sum(1) * broad.sum(1), TAPS_AT_ONCE)
    return [_some(images[part], rows[part], columns[part], shape) for part in parts]


def _some(images: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> Taps:
    boxes, high, broad = len(images), rows.shape[1], columns.shape[1]
    y, weight_y, starts_y = _listed(rows)
    x, weight_x, starts_x = _listed(columns)
    box, p, q = (
        each.flatten()
        for each in torch.meshgrid(
            *(torch.arange(count, device=images.device) for count in (boxes, high, broad)), indexing="ij"
        )
    )
    row, column = box * high + p, box * broad + q
    terms = grids(starts_y.diff()[row], starts_x.diff()[column])
    at_y = (starts_y[row])[terms.bins] + terms.rows
    at_x = (starts_x[column])[terms.bins] + terms.columns
    pixels = ((images[box] * shape[2])[terms.bins] + y[at_y]) * shape[3] + x[at_x]
    return Taps(pixels, weight_y[at_y] * weight_x[at_x], terms.starts)


def _listed(axis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The places in the last dimension that are not zero, their values, and where those of each vector begin."""
    there = axis.detach() != 0
    return there.nonzero()[:, 2], axis[there], starts_of(there.sum(2).flatten())


def sampled_axis(start: Tensor, size: Tensor, bins: int, samples: int, pixels: int) -> Tensor:
    """Weights ``(R, bins, pixels)`` of the mean over evenly spaced samples of each bin, interpolated between pixels.

    Args:
        start, size: ``(R,)`` where the boxes begin, and their extent; 0 is the centre of the first pixel.
        samples: in each bin; 0 for one a pixel.
    """
    bin_size = size / bins
    count = counted(bin_size, samples)
    count = torch.where(start.isfinite(), count, 0)
    begins = start.unsqueeze(1) + torch.arange(bins, device=start.device).to(start.dtype) * bin_size.unsqueeze(1)
    begins, count = begins.flatten(), count.repeat_interleave(bins)
    bin_size = bin_size.repeat_interleave(bins)
    weights = start.new_zeros((len(begins), pixels))
    for bin_of, sample in _samples_inside(begins, bin_size, count, pixels):
        position = begins[bin_of] + (sample.to(start.dtype) + 0.5) * bin_size[bin_of] / count[bin_of].to(start.dtype)
        inside = (position >= -1) & (position <= pixels)
        position = position.clamp(min=0)
        low = position.floor().clamp(max=pixels - 1)
        share = torch.where(low < pixels - 1, position - low, 0)
        for place, weight in ((low, 1 - share), (low + 1, share)):
            value = torch.where(inside, weight / count[bin_of].to(start.dtype), 0)
            weights.index_put_((bin_of, place.clamp(0, pixels - 1).long()), value, accumulate=True)
    return weights.view(len(start), bins, pixels)


def _samples_inside(begins: Tensor, bin_size: Tensor, count: Tensor, pixels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Bins and numbers of the samples that may be on the image: of a box far larger than the image, a few of many."""
    step = (bin_size.double() / count.clamp(min=1)).nan_to_num(0, 0, 0)
    step = torch.where(step == 0, 1, step)
    first, last = ((edge - begins.double()) / step - 0.5 for edge in (-1, pixels))
    low, high = torch.minimum(first, last), torch.maximum(first, last)
    low = (low.nan_to_num(0).floor() - 1).clamp(min=0).minimum(count.double())
    high = (high.nan_to_num(0).ceil() + 2).clamp(min=0).minimum(count.double())
    low, high = low.long(), high.long()
    for part in portions((high - low).clamp(min=0), TAPS_AT_ONCE):
        counts = (high[part] - low[part]).clamp(min=0)
        within = grids(counts, torch.ones_like(counts))
        yield within.bins + part.start, within.rows + low[part][within.bins]
