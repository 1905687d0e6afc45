"""What a size and a range make of a grid, in float32 as mmcv has it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernelgraft_core.sparse.grids import grid_steps

LARGEST_SITE = (1 << 31) - 1


@dataclass(frozen=True)
class Grid:
    """Size of a voxel, lower corner, and how many voxels there are, along each axis, ``x`` first."""

    size: tuple[float, ...]
    low: tuple[float, ...]
    shape: tuple[int, ...]


def grid_of(voxel_size: Sequence[float], point_range: Sequence[float]) -> Grid:
    """The grid of D sizes, and of D lower and then D upper bounds.

    Raises:
        ValueError: the numbers do not make a grid, or one of more than 2^62 voxels.
    """
    return _grid_of(tuple(voxel_size), tuple(point_range))


@functools.lru_cache(maxsize=256)
def _grid_of(voxel_size: tuple[float, ...], point_range: tuple[float, ...]) -> Grid:
    dimensions = len(voxel_size)
    if dimensions < 1 or len(point_range) != 2 * dimensions:
        raise ValueError(
            f"voxel_size has {dimensions} numbers and point_range {len(point_range)}, expected D and 2 D, D at least 1"
        )
    size, bounds = np.asarray(voxel_size, np.float32), np.asarray(point_range, np.float32)
    low, high = bounds[:dimensions], bounds[dimensions:]
    if not (np.isfinite(size).all() and np.isfinite(bounds).all() and (size > 0).all() and (high >= low).all()):
        raise ValueError(
            f"voxel_size is {voxel_size} and point_range {point_range}, expected finite numbers, sizes above 0, and "
            "low <= high"
        )
    with np.errstate(over="ignore"):
        extents = (high - low) / size
    if not (extents < LARGEST_SITE).all():
        raise ValueError(f"voxels of {voxel_size} make a grid of {extents.tolist()}, at most 2^31 - 1 of an axis")
    # Halves away from zero, as C rounds and Python does not.
    shape = [math.floor(float(extent) + 0.5) for extent in extents]
    grid_steps(shape, 1)
    return Grid(tuple(size.tolist()), tuple(low.tolist()), tuple(shape))
