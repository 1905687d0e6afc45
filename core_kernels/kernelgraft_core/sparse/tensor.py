"""Values at some sites of a grid, and what does not change them: stacking, cutting, adding, to dense and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .coordinates import Coordinates
from .grids import grid_keys, grid_steps


class SparseTensor:
    """Features at ``N`` different sites of ``batch_size`` grids of 1 to 4 dimensions.

    Args:
        feats: ``(N, C)``, any floating-point type.
        coords: integer ``(N, 1 + D)`` of rows ``[b, x, y, ...]``, in any order, or :class:`Coordinates` to share.
        stride: how far sites are apart in the grid of the input.
        spatial_shape: sizes of the grid; by default the least that holds all sites.
        batch_size: number of grids; by default one more than the largest ``b``.

    Raises:
        ValueError: what :class:`Coordinates` raises, or features do not belong to the coordinates.
    """

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor | Coordinates,
        stride: int | Sequence[int] = 1,
        spatial_shape: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not isinstance(coords, Coordinates):
            coords = Coordinates(coords, spatial_shape, batch_size, stride)
        elif (stride, spatial_shape, batch_size) != (1, None, None):
            raise ValueError(
                f"stride = {stride}, spatial_shape = {spatial_shape} and batch_size = {batch_size} are given beside "
                f"{coords}, which has its own"
            )
        if feats.dim() != 2 or len(feats) != len(coords) or not feats.is_floating_point():
            raise ValueError(
                f"feats is {feats.dtype} {tuple(feats.shape)}, expected floating point ({len(coords)}, C), a row for "
                "each coordinate"
            )
        if feats.device != coords.device:
            raise ValueError(f"feats is on {feats.device}, coordinates on {coords.device}")
        self.feats, self.coordinates = feats, coords

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseTensor:
        """Of ``(B, C, X, ...)``, at the sites where a channel is not 0."""
        where = (dense != 0).any(1).nonzero()
        coordinates = Coordinates(where, tuple(dense.shape[2:]), len(dense))
        return cls(dense.movedim(1, -1)[tuple(where.T)], coordinates)

    @classmethod
    def collate(cls, tensors: Sequence[SparseTensor]) -> SparseTensor:
        """One tensor of all grids, in order; the shape is the least that holds all.

        Raises:
            ValueError: there are none, or dimensions, channels or strides differ.
        """
        if not tensors:
            raise ValueError("there is nothing to collate")
        first, rows, batch = tensors[0], [], 0
        for tensor in tensors:
            if (tensor.stride, tensor.channels) != (first.stride, first.channels):
                raise ValueError(f"{tensor} does not go with {first}: strides, channels or dimensions differ")
            moved = tensor.coords.clone()
            moved[:, 0] += batch
            rows.append(moved)
            batch += tensor.batch_size
        shape = tuple(max(sizes) for sizes in zip(*(tensor.spatial_shape for tensor in tensors), strict=True))
        coordinates = Coordinates.known(torch.cat(rows), shape, batch, first.stride)
        return cls(torch.cat([tensor.feats for tensor in tensors]), coordinates)

    def __repr__(self) -> str:
        return f"<SparseTensor {tuple(self.feats.shape)} {self.feats.dtype} at {self.coordinates}>"

    @property
    def coords(self) -> Tensor:
        """int32 ``(N, 1 + D)`` of rows ``[b, x, y, ...]``."""
        return self.coordinates.indices

    @property
    def stride(self) -> tuple[int, ...]:
        return self.coordinates.stride

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        return self.coordinates.spatial_shape

    @property
    def batch_size(self) -> int:
        return self.coordinates.batch_size

    @property
    def channels(self) -> int:
        return self.feats.shape[1]

    @property
    def device(self) -> torch.device:
        return self.feats.device

    def rounded(self, multiple: int) -> SparseTensor:
        """In a grid whose sizes are multiples: layers of stride 2 then have an output for its last site too."""
        return SparseTensor(self.feats, self.coordinates.rounded(multiple))

    def replace(self, feats: Tensor) -> SparseTensor:
        """Other features at the same sites."""
        return SparseTensor(feats, self.coordinates)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SparseTensor:
        """Features in another type, all of it on another device."""
        feats = self.feats.to(device=device, dtype=dtype)
        return SparseTensor(feats, self.coordinates.to(feats.device))

    def to_dense(self) -> Tensor:
        """``(B, C, X, ...)``, contiguous, 0 where there is no site."""
        shape = self.spatial_shape
        dense = self.feats.new_zeros((self.batch_size, self.channels, math.prod(shape)))
        grid, *place = self.coords.long().unbind(1)
        site = grid_keys(torch.stack(place, 1), grid_steps(shape[1:], shape[0]))
        # Written where it belongs: to turn a grid that is mostly empty costs more than to fill it.
        dense.transpose(1, 2).index_put_((grid, site), self.feats)
        return dense.view(self.batch_size, self.channels, *shape)

    def to_bev(self, axis: int = -1) -> Tensor:
        """Seen from above: ``(B, C * Z, X, Y)``, where ``axis`` of the grid, by default the last, becomes channels."""
        return self.to_dense().movedim(2 + range(len(self.spatial_shape))[axis], 2).flatten(1, 2)

    def cat(self, *others: SparseTensor) -> SparseTensor:
        """Channels side by side, of tensors at the same sites.

        Raises:
            ValueError: sites differ; rows in another order count as different.
        """
        for other in others:
            if not _same(self.coordinates, other.coordinates):
                raise ValueError(f"{other} is not at the sites of {self}, in the same order")
        return self.replace(torch.cat((self.feats, *(other.feats for other in others)), 1))

    def __add__(self, other: SparseTensor) -> SparseTensor:
        """Sums where both have a site, the only summand elsewhere.

        Raises:
            ValueError: grids or channels differ.
        """
        a, b = self.coordinates, other.coordinates
        if (a.spatial_shape, a.batch_size, a.stride) != (b.spatial_shape, b.batch_size, b.stride) or (
            self.channels != other.channels
        ):
            raise ValueError(f"{other} cannot be added to {self}: grids or channels differ")
        if _same(a, b):
            return self.replace(self.feats + other.feats)
        rows = a.find(b.indices)
        new = rows < 0
        indices = torch.cat((a.indices, b.indices[new]))
        rows = rows.masked_scatter(new, torch.arange(len(a), len(indices), device=rows.device))
        feats = torch.cat((self.feats, self.feats.new_zeros((len(indices) - len(a), self.channels))))
        feats = feats.index_add(0, rows, other.feats.to(feats.dtype))
        return SparseTensor(feats, Coordinates.known(indices, a.spatial_shape, a.batch_size, a.stride))

    def prune(self, keep: Tensor) -> SparseTensor:
        """Only the rows that ``keep``, bool ``(N,)``, names.

        Raises:
            ValueError: its shape or dtype is wrong.
        """
        if keep.dtype != torch.bool or keep.shape != (len(self.feats),):
            raise ValueError(f"keep is {keep.dtype} {tuple(keep.shape)}, expected torch.bool ({len(self.feats)},)")
        known = self.coordinates
        left = Coordinates.known(known.indices[keep], known.spatial_shape, known.batch_size, known.stride)
        return SparseTensor(self.feats[keep], left)

    def crop(self, low: Sequence[int], high: Sequence[int]) -> SparseTensor:
        """Only sites with ``low <= (x, y, ...) < high``; the grid stays.

        Raises:
            ValueError: they do not have a number for each axis.
        """
        if not len(low) == len(high) == len(self.spatial_shape):
            raise ValueError(f"low is {low}, high is {high}, expected {len(self.spatial_shape)} numbers each")
        sites = self.coords[:, 1:]
        least, beyond = (torch.tensor(bound, device=self.device) for bound in (low, high))
        return self.prune(((sites >= least) & (sites < beyond)).all(1))


def _same(a: Coordinates, b: Coordinates) -> bool:
    if a is b:
        return True
    same = (a.spatial_shape, a.batch_size, a.stride) == (b.spatial_shape, b.batch_size, b.stride)
    return same and a.device == b.device and torch.equal(a.indices, b.indices)
