"""Scans for detectors: parts of real ones where the test data are, a scene of our own making elsewhere."""

import functools
import os
from pathlib import Path

import numpy as np

DATA = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")).resolve()
FILES = {
    "kitti": ("lidar/kitti/000008.bin", 4),
    "nuscenes": ("lidar/nuscenes/LIDAR_TOP__1532402927647951.pcd.bin", 5),
    "semantickitti": ("lidar/semantickitti/000000.bin", 4),
}


@functools.cache
def scan(name, radius=25.0):
    """float32 ``(N, 4)`` or ``(N, 5)``: x, y, z in metres, intensity, and time on nuScenes; within ``radius``."""
    path, columns = FILES[name]
    there = (DATA / path).is_file()
    points = np.fromfile(DATA / path, np.float32).reshape(-1, columns) if there else scene(columns)
    return points[np.linalg.norm(points[:, :2], axis=1) < radius]


def scene(columns, seed=0):
    """Ground and boxes in front of a sensor 1.7 m above it."""
    generator = np.random.default_rng(seed)
    ground = generator.uniform((0.0, -20.0, -1.75), (40.0, 20.0, -1.7), (6000, 3))
    sides = [
        generator.uniform((-0.5, -0.5, 0.0), (0.5, 0.5, 1.0), (400, 3)) * (3.9, 1.6, 1.5) + (x, y, -1.7)
        for x, y in generator.uniform((5.0, -15.0), (35.0, 15.0), (8, 2))
    ]
    points = np.concatenate([ground, *sides])
    return np.concatenate([points, generator.random((len(points), columns - 3))], 1).astype(np.float32)
