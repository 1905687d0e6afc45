"""Which sites of a grid are there: checked once, ordered once, shared by every tensor that has values at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grids import grid_keys, grid_steps
from .maps.ops import sparse_keys, sparse_sort

if TYPE_CHECKING:
    from .kernel_map import MadeBy

LARGEST_DIMENSIONS = 4
LARGEST_SIZE = (1 << 31) - 1
USUAL_MARGIN = 2


@dataclass(frozen=True)
class Keys:
    """Coordinates as numbers whose order is that of ``(b, x, y, ...)``.

    Attributes:
        sorted: int64 ``(N,)``, ascending.
        order: int64 ``(N,)``, the row that each of them stands for; None where rows are in that order.
        steps: how much a coordinate of each axis counts, the batch first.
        margin: how many more sites than the grid has are counted on both ends of each axis.
    """

    sorted: Tensor
    order: Tensor | None
    steps: tuple[int, ...]
    margin: tuple[int, ...]

    @property
    def offset(self) -> int:
        """The number of the grid's first site."""
        return sum(step * more for step, more in zip(self.steps[1:], self.margin, strict=True))


class Coordinates:
    """``N`` different sites of ``batch_size`` grids.

    Immutable, and shared by all tensors at the same sites. What is worked out of them is kept with them: keys, and what
    :meth:`.kernel_map.KernelMap.of` finds. ``made_by`` is the map of the convolution that these are the outputs of.

    Args:
        indices: integer ``(N, 1 + D)`` of rows ``[b, x, y, ...]``, D in 1..4; int32 unless it is already.
        spatial_shape: sizes of the grid; by default the least that holds all of them.
        batch_size: how many grids there are; by default one more than the largest ``b``.
        stride: how far sites are apart in the grid of the input, per axis or one for all.

    Raises:
        ValueError: a shape or dtype is wrong, a coordinate is negative, beyond the grid or there twice, or the grid has
            more sites than a 64-bit number counts; the message gives the row and the coordinate.
    """

    def __init__(
        self,
        indices: Tensor,
        spatial_shape: Sequence[int] | None = None,
        batch_size: int | None = None,
        stride: int | Sequence[int] = 1,
    ) -> None:
        if indices.dim() != 2 or not 2 <= indices.shape[1] <= 1 + LARGEST_DIMENSIONS:
            raise ValueError(
                f"coordinates are {tuple(indices.shape)}, expected (N, 1 + D) of [b, x, ...] with D in "
                f"1..{LARGEST_DIMENSIONS}"
            )
        if indices.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
            raise ValueError(f"coordinates are {indices.dtype}, expected integers")
        dimensions = indices.shape[1] - 1
        self.stride = per_axis("stride", stride, dimensions)
        low, high = _bounds(indices)
        if any(value < 0 for value in low):
            row = int((indices < 0).any(1).nonzero()[0])
            raise ValueError(f"row {row} of the coordinates is {indices[row].tolist()}, expected none below 0")
        self.batch_size = high[0] + 1 if batch_size is None else batch_size
        shape = [max(1, value + 1) for value in high[1:]] if spatial_shape is None else spatial_shape
        self.spatial_shape = per_axis("spatial_shape", shape, dimensions)
        limits = (self.batch_size, *self.spatial_shape)
        if any(value >= limit for value, limit in zip(high, limits, strict=True)):
            beyond = indices >= torch.tensor(limits, device=indices.device)
            row = int(beyond.any(1).nonzero()[0])
            raise ValueError(
                f"row {row} of the coordinates is {indices[row].tolist()}, which is beyond batch_size = "
                f"{self.batch_size} and spatial_shape = {self.spatial_shape}"
            )
        if max(limits) > LARGEST_SIZE:
            raise ValueError(
                f"batch_size is {self.batch_size} and spatial_shape {self.spatial_shape}, at most {LARGEST_SIZE} sites "
                "along an axis are supported"
            )
        # Of its own: what is known of the sites would not follow a change of somebody else's.
        self.indices = indices.to(torch.int32, copy=True).contiguous()
        self._keys: dict[tuple[int, ...], Keys] = {}
        self.found: dict[object, Any] = {}
        self.made_by: MadeBy | None = None
        keys = self.any_keys()
        twice = (keys.sorted[1:] == keys.sorted[:-1]).nonzero()
        if len(twice):
            first = int(twice[0])
            rows = [first, first + 1] if keys.order is None else keys.order[first : first + 2].tolist()
            raise ValueError(f"rows {rows[0]} and {rows[1]} of the coordinates are both {indices[rows[0]].tolist()}")

    @classmethod
    def known(
        cls, indices: Tensor, spatial_shape: tuple[int, ...], batch_size: int, stride: tuple[int, ...]
    ) -> Coordinates:
        """Without checks: int32 rows that are in the grid, and different."""
        made = cls.__new__(cls)
        made.indices, made.spatial_shape, made.batch_size, made.stride = indices, spatial_shape, batch_size, stride
        made._keys, made.found, made.made_by = {}, {}, None
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be worked out again."""
        return {"indices": self.indices, "spatial_shape": self.spatial_shape, "batch_size": self.batch_size,
                "stride": self.stride}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(Coordinates.known(**state).__dict__)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return (
            f"<{len(self)} of {self.batch_size} x {self.spatial_shape} sites, stride {self.stride}, "
            f"{self.indices.device}>"
        )

    @property
    def dimensions(self) -> int:
        return self.indices.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def keys(self, margin: tuple[int, ...]) -> Keys:
        """As numbers that leave ``margin`` more sites or more on both ends of each axis: no neighbour is another row's.

        Raises:
            ValueError: there are more such sites than numbers.
        """
        for known in self._keys.values():
            if all(there >= more for there, more in zip(known.margin, margin, strict=True)):
                return known
        found = self._keys[margin] = self._order(margin)
        return found

    def any_keys(self) -> Keys:
        """As numbers with whatever margin; the first has room for the kernels that most layers have."""
        if self._keys:
            return next(iter(self._keys.values()))
        try:
            return self.keys((USUAL_MARGIN,) * self.dimensions)
        except ValueError:  # a gigantic grid; without a margin it may be countable
            return self.keys((0,) * self.dimensions)

    def find(self, indices: Tensor) -> Tensor:
        """The row of each of ``indices`` int ``(M, 1 + D)``, int64 ``(M,)``, -1 for sites that are not there."""
        keys = self.any_keys()
        limits = torch.tensor((self.batch_size, *self.spatial_shape), device=self.device)
        inside = ((indices >= 0) & (indices < limits)).all(1)
        if not len(self):
            return torch.full((len(indices),), -1, device=self.device)
        wanted = grid_keys(indices, keys.steps) + keys.offset
        at = torch.searchsorted(keys.sorted, wanted).clamp_(max=len(self) - 1)
        rows = at if keys.order is None else keys.order[at]
        return torch.where(inside & (keys.sorted[at] == wanted), rows, -1)

    def to(self, device: torch.device | str) -> Coordinates:
        """On another device; the same object where it is there already."""
        moved = self.indices.to(device)
        if moved is self.indices:
            return self
        return Coordinates.known(moved, self.spatial_shape, self.batch_size, self.stride)

    def rounded(self, multiple: int) -> Coordinates:
        """The same rows in a grid whose sizes are multiples: halvings then lose no site at its end. Made once."""
        shape = tuple(-(-size // multiple) * multiple for size in self.spatial_shape)
        if shape == self.spatial_shape:
            return self
        key = "rounded", multiple
        if key not in self.found:
            self.found[key] = Coordinates.known(self.indices, shape, self.batch_size, self.stride)
        made: Coordinates = self.found[key]
        return made

    def _order(self, margin: tuple[int, ...]) -> Keys:
        sizes = [size + 2 * more for size, more in zip(self.spatial_shape, margin, strict=True)]
        steps = grid_steps(sizes, self.batch_size)
        offset = sum(step * more for step, more in zip(steps[1:], margin, strict=True))
        if not self._keys:
            ordered, order = sparse_sort(self.indices, steps)
            return Keys(ordered.add_(offset) if offset else ordered, order, steps, margin)
        order = self.any_keys().order  # the same for every margin
        return Keys(sparse_keys(self.indices, order, steps, offset), order, steps, margin)


def per_axis(name: str, value: int | Sequence[int], dimensions: int, least: int = 1) -> tuple[int, ...]:
    """One number for each axis.

    Raises:
        ValueError: there is another number of them, or one is below ``least``.
    """
    given = (value,) * dimensions if isinstance(value, int) else tuple(value)
    values = tuple(int(each) for each in given)
    if len(values) != dimensions or values != given or any(each < least for each in values):
        raise ValueError(f"{name} is {value}, expected one whole number or {dimensions}, each at least {least}")
    return values


def _bounds(indices: Tensor) -> tuple[list[int], list[int]]:
    """The least and the largest coordinate of every axis; 0 and -1 where there are no rows."""
    if not len(indices):
        return [0] * indices.shape[1], [-1] * indices.shape[1]
    low, high = indices.aminmax(dim=0)
    return low.tolist(), high.tolist()
