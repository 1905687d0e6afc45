"""The sites of a tensor of indices, worked out once for all layers that are given the same tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse import Coordinates

_known: Derived[dict[tuple[tuple[int, ...], int], Coordinates]] = Derived()


def sites_of(indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> Coordinates:
    """Coordinates of integer ``(N, 1 + D)`` rows ``[b, z, y, x]``; the same object as long as the tensor is unchanged.

    Raises:
        ValueError: a row is not in the grid, or there twice.
    """
    shape, batch_size = tuple(int(size) for size in spatial_shape), int(batch_size)
    known = _known.of((indices,), dict)
    if (shape, batch_size) not in known:
        known[shape, batch_size] = Coordinates(indices, shape, batch_size)
    return known[shape, batch_size]


def indices_of(sites: Coordinates) -> Tensor:
    """Their rows, for a host to keep: a tensor that :func:`sites_of` knows."""
    indices = sites.indices.detach()  # another object: the sites would keep their own tensor, and so themselves, alive
    _known.of((indices,), dict)[sites.spatial_shape, sites.batch_size] = sites
    return indices
