"""Sites of a tensor of indices and kernel maps of them, worked out once for all layers that are given the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse import ConvGeometry, Coordinates, KernelMap

_known: Derived[dict[tuple[tuple[int, ...], int], Coordinates]] = Derived()


def sites_of(indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> Coordinates:
    """Coordinates of integer ``(N, 1 + D)`` rows ``[b, z, y, x]``; the same object as long as the tensor is unchanged.

    Raises:
        ValueError: a row is not in the grid, or there twice.
    """
    shape, batch_size = tuple(max(1, int(size)) for size in spatial_shape), int(batch_size)
    known = _known.of((indices,), dict)
    found = known.get((shape, batch_size))
    # Writes through numpy, or to a tensor of inference mode, are not counted: a buffer may hold the next scan by now.
    unseen = indices.device.type == "cpu" or indices.is_inference()
    if found is None or (unseen and not torch.equal(found.indices, indices)):
        found = known[shape, batch_size] = Coordinates(indices, shape, batch_size)
    return found


def indices_of(sites: Coordinates) -> Tensor:
    """Their rows, for a host to keep: a tensor that :func:`sites_of` knows."""
    indices = sites.indices.clone()  # the host's to write to; the sites stay what they are
    _known.of((indices,), dict)[sites.spatial_shape, sites.batch_size] = sites
    return indices


def map_of(
    geometry: ConvGeometry, sites: Coordinates, transposed: bool = False, out_shape: tuple[int, ...] | None = None
) -> KernelMap:
    """The kernel map of a layer; without outputs, as in mmcv, where its kernel is larger than the padded grid.

    Raises:
        ValueError: a transposed convolution has no grid of ``out_shape``.
    """
    around = zip(sites.spatial_shape, geometry.kernel_size, geometry.padding, geometry.dilation, strict=True)
    if transposed or geometry.submanifold or all(n + 2 * p > d * (k - 1) for n, k, p, d in around):
        return KernelMap.of(geometry, sites, transposed=transposed, out_shape=out_shape)
    nowhere = Coordinates.known(sites.indices[:0], (1,) * geometry.dimensions, sites.batch_size, sites.stride)
    return KernelMap(geometry, sites, nowhere, sites.indices.new_empty((0, geometry.volume)))
