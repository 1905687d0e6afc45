"""Random sites with features for tests, and dense grids of them."""

import math

import torch

SHAPE = (7, 9, 8)


def scattered(rows=60, channels=5, batch_size=2, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    limits = (batch_size, *shape)
    places = torch.randperm(math.prod(limits), generator=generator)[:rows]
    indices = torch.stack(torch.unravel_index(places, limits), 1).int()
    return torch.randn(rows, channels, generator=generator, dtype=torch.float32), indices


def dense_of(features, indices, batch_size=2, shape=SHAPE):
    dense = features.new_zeros((batch_size, *shape, features.shape[1]))
    return dense.index_put(tuple(indices.long().T), features).movedim(-1, 1)
