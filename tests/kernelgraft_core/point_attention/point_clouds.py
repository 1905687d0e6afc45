"""Coordinates for tests."""

import torch


def random_coords(counts, grid_shape=(40, 30, 1), seed=0, shuffled=True):
    """int32 ``(N, 4)`` with rows (sample, z, y, x), no two alike, ``counts[b]`` of sample ``b``."""
    generator = torch.Generator().manual_seed(seed)
    size_x, size_y, size_z = grid_shape
    found = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(size_x * size_y * size_z, generator=generator)[:count]
        x, y, z = cells % size_x, cells // size_x % size_y, cells // (size_x * size_y)
        found.append(torch.stack((torch.full_like(x, sample), z, y, x), 1))
    coords = torch.cat(found) if found else torch.zeros(0, 4)
    if shuffled:
        coords = coords[torch.randperm(len(coords), generator=generator)]
    return coords.int()
