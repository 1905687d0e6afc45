"""Random sites for tests, and dense convolution as what is true."""

import torch
import torch.nn.functional as F

from kernelgraft_core.sparse.coordinates import Coordinates

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SHAPES = {1: (97,), 2: (19, 14), 3: (9, 11, 6), 4: (5, 4, 6, 3)}


def random_sites(dimensions, seed=0, density=0.2, batch=2, shuffled=True, shape=None):
    """Coordinates of about ``density`` of the sites of small grids, rows in random order."""
    shape = shape or SHAPES[dimensions]
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.rand(batch, *shape, generator=generator) < density).nonzero()
    if shuffled:
        indices = indices[torch.randperm(len(indices), generator=generator)]
    return Coordinates(indices, shape, batch)


def dense_weight(weight, kernel_size):
    """``(K, G, Cin / G, Cout / G)`` as torch's convolutions take it."""
    _, groups, cin, cout = weight.shape
    return weight.permute(1, 3, 2, 0).reshape(groups * cout, cin, *kernel_size)
