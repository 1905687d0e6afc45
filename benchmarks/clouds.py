"""Real point clouds for benchmarks of sparse convolution, as voxels."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernelgraft_core.sparse.voxels import voxelize

from .cases import UnavailableError


@dataclass(frozen=True)
class Cloud:
    """A scan: its file below the test data, float32 columns in a row of it, and the size of a voxel in metres."""

    path: str
    columns: int
    voxel: tuple[float, float, float]


CLOUDS = {
    "semantickitti": Cloud("lidar/semantickitti/000000.bin", 4, (0.05, 0.05, 0.05)),
    "kitti": Cloud("lidar/kitti/000008.bin", 4, (0.05, 0.05, 0.1)),
    "nuscenes": Cloud("lidar/nuscenes/LIDAR_TOP__1532402927647951.pcd.bin", 5, (0.1, 0.1, 0.2)),
}


@functools.cache
def load_cloud(name: str) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Sites int32 ``(N, 4)`` in the order of their coordinates, the shape of their grid, and mean points ``(N, 4)``.

    Raises:
        UnavailableError: the scan is not there.
    """
    cloud = CLOUDS[name]
    path = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / cloud.path
    if not path.is_file():
        raise UnavailableError(f"{path} is not there: set KERNELGRAFT_TEST_DATA")
    points = torch.from_numpy(np.fromfile(path, np.float32)).view(-1, cloud.columns)[:, :4]
    voxels, _ = voxelize(points[:, :3].contiguous(), points, cloud.voxel)
    return voxels.coords, voxels.spatial_shape, voxels.feats
