"""Keys that order points along a curve: neighbours on the curve share a group, and groups attend.

A key is a callable ``key(coords, grid_shape) -> int64 (N,)``; rows of a sample are put in the order of their keys,
equal ones in the order that they came in. Any function of this form will do. The keys here also say how large a key can
be, ``key.span(grid_shape)``, so that the number of the sample and the key fit one number, and one sort is enough.

``coords`` are integers ``(N, 4)`` with rows (sample, z, y, x), as voxelization gives them; ``grid_shape`` is
``(size_x, size_y, size_z)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

from kernelgraft_core.sparse.grids import LARGEST_KEY

GridShape = Sequence[int]
AXES = ("x", "y")
LARGEST_TABLE = 1 << 20  # cells of a plane whose keys are kept, in 8 MiB


class Key(Protocol):
    """What orders the rows of a sample."""

    def __call__(self, coords: Tensor, grid_shape: GridShape) -> Tensor: ...


@dataclass(frozen=True)
class WindowKey:
    """The order of FlatFormer (arXiv 2301.08739): window after window, and in a window cell after cell.

    Along ``axis="x"`` windows go row by row, in a row by x; cells of a window go column by column, in a column by y.
    Every other row of windows, and every other column of cells, goes backwards, so that the way has no jumps.
    ``axis="y"`` exchanges x and y. Windows of another height are other windows, the lowest first; cells of one column
    and y go by z.

    Attributes:
        window_shape: cells along (x, y, z).
        axis: ``"x"`` or ``"y"``.
        shifted: windows begin half a window earlier in x and y.
    """

    window_shape: tuple[int, int, int]
    axis: str = "x"
    shifted: bool = False

    def __post_init__(self) -> None:
        if len(self.window_shape) != 3 or min(self.window_shape) < 1:
            raise ValueError(f"window_shape is {self.window_shape}, expected three sizes (x, y, z) of at least 1")
        object.__setattr__(self, "window_shape", tuple(self.window_shape))
        if self.axis not in AXES:
            raise ValueError(f"axis is {self.axis!r}, expected one of {AXES}")

    def __call__(self, coords: Tensor, grid_shape: GridShape) -> Tensor:
        size_x, size_y, size_z = grid_shape
        if size_z == 1 and size_x * size_y <= LARGEST_TABLE and _is_plain(coords):
            # Looked up: divisions by the sizes of windows take longer than all the rest of an order.
            _, _, y, x = coords.long().unbind(1)
            return _table(self, size_x, size_y).take(y * size_x + x)
        return self._number(coords, grid_shape)

    def _number(self, coords: Tensor, grid_shape: GridShape) -> Tensor:
        z, y, x = coords[:, 1:].long().unbind(1)
        (wide, high, deep), (columns, rows, _) = self.window_shape, self._windows(grid_shape)
        if self.shifted:
            x, y = x + wide // 2, y + high // 2
        if self.axis == "y":
            x, y, wide, high, columns, rows = y, x, high, wide, rows, columns
        row, column, level = y // high, x // wide, z // deep
        x, y, z = x - column * wide, y - row * high, z - level * deep
        back = row % 2 == 1
        column = torch.where(back, columns - 1 - column, column)
        y = torch.where(back ^ (x % 2 == 1), high - 1 - y, y)
        x = torch.where(back, wide - 1 - x, x)
        window = (level * rows + row) * columns + column
        return ((window * wide + x) * high + y) * deep + z

    def span(self, grid_shape: GridShape) -> int:
        columns, rows, levels = self._windows(grid_shape)
        wide, high, deep = self.window_shape
        return columns * rows * levels * wide * high * deep

    def _windows(self, grid_shape: GridShape) -> tuple[int, int, int]:
        """How many there are along x, y and z."""
        shifts = [size // 2 if self.shifted and at < 2 else 0 for at, size in enumerate(self.window_shape)]
        counts = [
            -(-(size + shift) // step) for size, shift, step in zip(grid_shape, shifts, self.window_shape, strict=True)
        ]
        return counts[0], counts[1], counts[2]


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are at hand on a CPU, now: it is neither traced nor a stand-in for one."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _len_torch_dispatch_stack()
        and not _are_functorch_transforms_active()
    )


@functools.lru_cache(maxsize=32)
def _table(key: WindowKey, size_x: int, size_y: int) -> Tensor:
    """The key of every cell of a plane on a CPU, row by row."""
    y, x = torch.meshgrid(torch.arange(size_y), torch.arange(size_x), indexing="ij")
    cells = torch.stack((torch.zeros_like(x), torch.zeros_like(x), y, x), 2).flatten(0, 1)
    return key._number(cells, (size_x, size_y, 1))


@dataclass(frozen=True)
class ZOrderKey:
    """Morton order: the bits of x, y and z in turns, x the lowest. A grid with one level is a plane."""

    def __call__(self, coords: Tensor, grid_shape: GridShape) -> Tensor:
        axes, bits = _axes(coords, grid_shape)
        return _interleaved(axes[::-1], bits)

    def span(self, grid_shape: GridShape) -> int:
        return _curve_span(grid_shape)


@dataclass(frozen=True)
class HilbertKey:
    """Hilbert order, by Skilling's transform (Programming the Hilbert curve, AIP 2004). A grid with one level is a
    plane. Cells that follow each other are neighbours.
    """

    def __call__(self, coords: Tensor, grid_shape: GridShape) -> Tensor:
        axes, bits = _axes(coords, grid_shape)
        for bit in range(bits - 1, 0, -1):  # from the largest cubes to the smallest: turn what is inside
            below = (1 << bit) - 1
            for i, axis in enumerate(axes):
                set_here = (axis >> bit & 1).bool()
                swapped = torch.where(set_here, 0, (axes[0] ^ axis) & below)
                axes[0] = torch.where(set_here, axes[0] ^ below, axes[0] ^ swapped)
                if i:
                    axes[i] = axis ^ swapped
        for i in range(1, len(axes)):  # the Gray code of the turned bits
            axes[i] = axes[i] ^ axes[i - 1]
        turned = torch.zeros_like(axes[0])
        for bit in range(bits - 1, 0, -1):
            turned = torch.where((axes[-1] >> bit & 1).bool(), turned ^ ((1 << bit) - 1), turned)
        return _interleaved([axis ^ turned for axis in axes], bits)

    def span(self, grid_shape: GridShape) -> int:
        return _curve_span(grid_shape)


def _axes(coords: Tensor, grid_shape: GridShape) -> tuple[list[Tensor], int]:
    """Coordinates along x, y and, where the grid has levels, z; and the bits that hold each."""
    count = _dimensions(grid_shape)
    return [coords[:, 3 - axis].long() for axis in range(count)], _bits(grid_shape)


def _interleaved(axes: Sequence[Tensor], bits: int) -> Tensor:
    """One number of the bits of several, in turns; the first of them is the highest."""
    key = torch.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            key = key << 1 | (axis >> bit & 1)
    return key


def _dimensions(grid_shape: GridShape) -> int:
    return 2 if grid_shape[2] == 1 else 3


def _bits(grid_shape: GridShape) -> int:
    return max(1, *((size - 1).bit_length() for size in grid_shape))


def _curve_span(grid_shape: GridShape) -> int:
    return 1 << (_dimensions(grid_shape) * _bits(grid_shape))


def batch_key(key: Key, coords: Tensor, grid_shape: GridShape, batch_size: int) -> Tensor:
    """Numbers int64 ``(N,)`` that order all rows: by sample first, then by ``key``, whatever its values are.

    Args:
        coords: int32 or int64 ``(N, 4)``, rows (sample, z, y, x) in any order.
        grid_shape: ``(size_x, size_y, size_z)``.

    Raises:
        ValueError: coords has another shape or dtype, or lies outside the grid or the batch (looked at on a CPU only,
            where it costs no waiting); the key gives something else than one int64 a row; more than 2^62 keys.
    """
    return _batch_key(key, coords, grid_shape, batch_size)[0]


def order_rows(key: Key, coords: Tensor, grid_shape: GridShape, batch_size: int) -> tuple[Tensor, Tensor]:
    """Rows by sample and key, int64 ``(N,)``, and where each sample begins in there and the last ends, ``(B + 1,)``.

    Arguments and errors are those of :func:`batch_key`.
    """
    keys, span = _batch_key(key, coords, grid_shape, batch_size)
    values, order = keys.sort(stable=True)
    return order, torch.searchsorted(values, torch.arange(batch_size + 1, device=coords.device) * span)


def _batch_key(key: Key, coords: Tensor, grid_shape: GridShape, batch_size: int) -> tuple[Tensor, int]:
    """The numbers, and how far those of one sample are from those of the next."""
    check_coords(coords, grid_shape, batch_size)
    sample = coords[:, 0].long()
    span_of: Callable[[GridShape], int] | None = getattr(key, "span", None)
    span = None if span_of is None else span_of(grid_shape)
    if span is not None and span * max(1, batch_size) >= LARGEST_KEY:
        raise ValueError(f"{batch_size} grids of {tuple(grid_shape)} have {span * batch_size} keys, more than 2^62")
    values = key(coords, grid_shape)
    if values.dtype != torch.int64 or values.shape != sample.shape:
        raise ValueError(
            f"{key} gives {values.dtype} {tuple(values.shape)} for {len(coords)} rows, expected torch.int64 "
            f"({len(coords)},)"
        )
    if span is not None:
        return sample * span + values, span
    # Of a key whose values may be anything only the order is used.
    order = values.argsort(stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    is_new, ordered = torch.zeros_like(order), values[order]
    is_new[1:] = (ordered[1:] != ordered[:-1]).long()
    ranks = is_new.cumsum(0)[ranks]  # equal values are equal ranks, so that ties stay ties
    span = max(1, len(coords))
    return sample * span + ranks, span


def check_coords(coords: Tensor, grid_shape: GridShape, batch_size: int) -> None:
    """Raise ValueError where coordinates are not what :func:`batch_key` takes."""
    if coords.dtype not in (torch.int32, torch.int64) or coords.dim() != 2 or coords.shape[1] != 4:
        raise ValueError(
            f"coords is {coords.dtype} {tuple(coords.shape)}, expected torch.int32 or torch.int64 (N, 4) with rows "
            "(sample, z, y, x)"
        )
    if len(grid_shape) != 3 or min(grid_shape) < 1 or max(grid_shape) >= 1 << 31:
        raise ValueError(f"grid_shape is {tuple(grid_shape)}, expected three sizes (x, y, z) of 1 to 2^31 - 1")
    if batch_size < 0:
        raise ValueError(f"batch_size is {batch_size}, expected at least 0")
    if not _is_plain(coords) or not len(coords):
        return
    low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
    limits = (batch_size, *reversed(grid_shape))
    for name, first, last, limit in zip(("sample", "z", "y", "x"), low, high, limits, strict=True):
        if first < 0 or last >= limit:
            raise ValueError(f"{name} of coords goes from {first} to {last}, expected 0 to {limit - 1}")
