"""Weighted sums of pixels, the primitive under RoI pooling and deformable convolution.

Every sampled value is a sum of a few pixels of a feature map, each times a weight. Held as *taps* (which pixels, which
weights, where each sum begins), such sums run on torch's ``embedding_bag``: nothing is gathered into memory, any device
can do it, and the order of additions is settled. The gradient of the feature map is the same sum the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernelgraft_core.sparse.grids import starts_of

from .precision import wide

TAPS_AT_ONCE = 1 << 22  # about 256 MB while they are made
SAMPLES_OF_A_BIN = 1 << 22


@dataclass(frozen=True)
class Taps:
    """``B`` weighted sums over the pixels of feature maps ``(N, C, H, W)``.

    Attributes:
        pixels: int64 ``(T,)``, ``(n * H + y) * W + x``; ``N * H * W`` stands for a pixel that is zero.
        weights: ``(T,)`` of the dtype that sums are made in.
        starts: int64 ``(B + 1,)``: sum ``b`` is over the taps ``starts[b]`` to ``starts[b + 1]``.
    """

    pixels: Tensor
    weights: Tensor
    starts: Tensor


def gather(x: Tensor, taps: Sequence[Taps]) -> Tensor:
    """The sums ``(B, C)`` over feature maps ``(N, C, H, W)``, all parts of ``taps`` one after another.

    In float32 at least. Differentiable in ``x`` and the weights.
    """
    table = pixel_table(x)
    sums = [weighted_rows(table, part) for part in taps]
    if len(sums) == 1:
        return sums[0]
    return torch.cat(sums) if sums else table.new_zeros((0, x.shape[1]))


def scatter(grad: Tensor, taps: Sequence[Taps], shape: Sequence[int]) -> Tensor:
    """The gradient of ``x``, of that shape, from that of ``gather(x, taps)``; float32 at least."""
    images, channels, height, width = shape
    grad = grad.to(wide(grad))
    total: Tensor | None = None
    first = 0
    for part in taps:
        last = first + len(part.starts) - 1
        found = _transposed(grad[first:last], part, images * height * width + 1)[:-1]
        total = found if total is None else total.add_(found)
        first = last
    if total is None:
        total = grad.new_zeros((images * height * width, channels))
    return total.view(images, height, width, channels).permute(0, 3, 1, 2)


def add_at(count: int, places: Tensor, values: Tensor) -> Tensor:
    """``(count,)``, the sum of the values for each place; any number of them, in a settled order."""
    total = values.new_zeros(count)
    if values.device.type == "cpu":
        return total.scatter_add_(0, places.flatten(), values.flatten())  # on one thread, as index_put_, but in a third
    return total.index_put_((places.flatten(),), values.flatten(), accumulate=True)  # sorted, unlike scatter_add_ there


def pixel_table(x: Tensor) -> Tensor:
    """Feature maps ``(N, C, H, W)`` as one row of channels for each pixel, and a row of zeros behind them."""
    images, channels, height, width = x.shape
    table = x.new_zeros((images * height * width + 1, channels), dtype=wide(x))
    table[:-1].view(images, height, width, channels).copy_(x.permute(0, 2, 3, 1))
    return table


def weighted_rows(table: Tensor, taps: Taps) -> Tensor:
    """:func:`gather` from a table of pixels."""
    if taps.weights.requires_grad:
        return _bags(table, taps.pixels, taps.weights, taps.starts)
    out: Tensor = _WeightedRows.apply(  # type: ignore[no-untyped-call]
        table, taps.pixels, taps.weights, taps.starts
    )
    return out


class _WeightedRows(torch.autograd.Function):
    """Torch's own gradient of a table is several times slower when many bags share a row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, pixels: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(pixels, weights, starts)
        ctx.rows = len(table)
        return _bags(table, pixels, weights, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _transposed(grad, Taps(*ctx.saved_tensors), ctx.rows), None, None, None


def _bags(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    if not (len(table) and table.shape[1] and len(starts) > 1):
        return table.new_zeros((len(starts) - 1, table.shape[1]))
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _transposed(grad: Tensor, taps: Taps, rows: int) -> Tensor:
    """For each row of the table the sum over the bags that it is in, in the order of the bags."""
    keys = taps.pixels.int() if rows < 1 << 31 else taps.pixels  # sorting half the bits takes half the time
    order = keys.sort(stable=True).indices
    bags = torch.repeat_interleave(
        torch.arange(len(grad), device=grad.device), taps.starts.diff(), output_size=len(taps.pixels)
    )
    starts = starts_of(torch.bincount(taps.pixels, minlength=rows))
    return _bags(grad.contiguous(), bags[order], taps.weights.detach()[order], starts)


def bordered_corners(images: Tensor, y: Tensor, x: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation as RoI pooling does it: a border of one pixel around an image repeats its edge.

    Args:
        images: int64 ``(S,)`` which feature map each position is on.
        y, x: ``(S,)`` positions; 0 is the centre of the first pixel. Outside of ``[-1, H]`` and ``[-1, W]``, and where
            they are NaN, the value is zero.
        shape: of the feature maps, ``(N, C, H, W)``.

    Returns:
        Pixels int64 and weights, both ``(S, 4)``. Weights are differentiable in ``y`` and ``x``.
    """
    count, _, height, width = shape
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    rows, row_weights = _pair_of(y, height, inside)
    columns, column_weights = _pair_of(x, width, inside)
    pixels = ((images * height).unsqueeze(1) + rows).unsqueeze(2) * width + columns.unsqueeze(1)
    weights = row_weights.unsqueeze(2) * column_weights.unsqueeze(1)
    outside = ~inside.unsqueeze(1)
    pixels = pixels.flatten(1).masked_fill(outside, count * height * width)
    return pixels, weights.flatten(1).masked_fill(outside, 0)


def _pair_of(position: Tensor, size: int, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The two pixels along an axis, int64 ``(S, 2)``, and their weights."""
    position = torch.where(inside, position, 0).clamp(min=0)
    low = position.detach().floor().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = torch.where(low < size - 1, position - low, 0)
    return torch.stack((low, high), 1).long(), torch.stack((1 - share, share), 1)


def padded_corners(images: Tensor, y: Tensor, x: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation on an image that goes on with zeros, as deformable convolution does it.

    Arguments and results as for :func:`bordered_corners`.
    """
    count, _, height, width = shape
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    low_y, low_x = y.detach().floor(), x.detach().floor()
    share_y, share_x = y - low_y, x - low_x
    rows, columns = (torch.stack((low, low + 1), 1).long() for low in (low_y, low_x))
    on_rows = (rows >= 0) & (rows < height) & inside.unsqueeze(1)
    on_columns = (columns >= 0) & (columns < width)
    there = (on_rows.unsqueeze(2) & on_columns.unsqueeze(1)).flatten(1)
    pixels = ((images * height).unsqueeze(1) + rows).unsqueeze(2) * width + columns.unsqueeze(1)
    row_weights, column_weights = (torch.stack((1 - share, share), 1) for share in (share_y, share_x))
    weights = (row_weights.unsqueeze(2) * column_weights.unsqueeze(1)).flatten(1)
    return pixels.flatten(1).masked_fill(~there, count * height * width), weights.masked_fill(~there, 0)


def regular(pixels: Tensor, weights: Tensor) -> Taps:
    """Taps of sums that all have the same number of terms, ``(B, K)``."""
    count, terms = pixels.shape
    starts = torch.arange(0, (count + 1) * max(1, terms), max(1, terms), device=pixels.device)[: count + 1]
    return Taps(pixels.flatten(), weights.flatten(), starts)


def counted(size: Tensor, samples: int) -> Tensor:
    """How many samples a bin of ``size`` pixels has along an axis, int64: ``samples``, or one a pixel where that is 0.

    A bin without extent has none, nor has one that is infinite or NaN.
    """
    if samples > 0:
        return torch.where(size.isfinite(), samples, 0)
    return torch.where(size.isfinite(), size, 0).ceil().clamp(0, 1 << 31).long()


@dataclass(frozen=True)
class Grids:
    """Grids of samples in bins, all samples one after another.

    Attributes:
        bins: int64 ``(S,)`` which bin each sample is in, ascending.
        rows, columns: int64 ``(S,)`` its place in the grid.
        starts: int64 ``(B + 1,)``.
    """

    bins: Tensor
    rows: Tensor
    columns: Tensor
    starts: Tensor

    def shares(self, bins: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where in its bin each sample is, from 0 to 1 along each axis; float64.

        Args:
            bins: int64 ``(S,)`` entries of ``rows`` and ``columns``, how many samples a bin has along each axis.
        """
        return (self.rows + 0.5) / rows[bins].double(), (self.columns + 0.5) / columns[bins].double()


def check_samples(rows: Tensor, columns: Tensor) -> None:
    """Raises:
    ValueError: a bin has more than 2^22 samples: it is thousands of pixels wide, which is no RoI any more.
    """
    counts = rows * columns
    if len(counts) and int(counts.max()) > SAMPLES_OF_A_BIN:
        worst = int(counts.argmax())
        raise ValueError(
            f"bin {worst} asks for {int(rows[worst])} x {int(columns[worst])} samples, at most {SAMPLES_OF_A_BIN}"
        )


def grids(rows: Tensor, columns: Tensor) -> Grids:
    """Grids of ``rows (B,)`` times ``columns (B,)`` samples, row by row."""
    counts = rows * columns
    starts = starts_of(counts)
    total = int(starts[-1])
    bins = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)
    place = torch.arange(total, device=counts.device) - starts[bins]
    return Grids(bins, place // columns[bins], place % columns[bins], starts)


def mean_of_grids(
    images: Tensor,
    rows: Tensor,
    columns: Tensor,
    position: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    shape: Sequence[int],
) -> list[Taps]:
    """Taps of the mean over a grid of interpolated samples in each of ``B`` bins.

    Args:
        images: int64 ``(B,)`` which feature map each bin is on.
        rows, columns: int64 ``(B,)`` samples of each bin; a bin without is zero.
        position: y and x of samples, from the bin each is in and the share of its bin, ``0 .. 1``, that lies before it
            along each axis; ``(S,)`` all.
        shape: of the feature maps, ``(N, C, H, W)``.

    Raises:
        ValueError: see :func:`check_samples`.
    """
    check_samples(rows, columns)
    taps = []
    for part in portions(rows * columns, TAPS_AT_ONCE // 4):
        places = grids(rows[part], columns[part])
        bins = places.bins + part.start
        pixels, weights = bordered_corners(images[bins], *position(bins, *places.shares(bins, rows, columns)), shape)
        weights = weights / (rows * columns)[bins].to(weights.dtype).unsqueeze(1)
        taps.append(Taps(pixels.flatten(), weights.flatten(), 4 * places.starts))
    return taps


def portions(counts: Tensor, at_once: int) -> Iterator[slice]:
    """Cuts entries that follow each other so that the counts of each cut add up to ``at_once`` at most, if they can."""
    if len(counts) and int(counts.sum()) <= at_once:
        yield slice(0, len(counts))
        return
    totals = counts.cumsum(0).tolist()
    first, before = 0, 0
    for entry, total in enumerate(totals):
        if total - before > at_once and entry > first:
            yield slice(first, entry)
            first, before = entry, totals[entry - 1]
    if totals:
        yield slice(first, len(totals))
