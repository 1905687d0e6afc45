"""Sparse convolution on point clouds and other grids that are mostly empty (TorchSparse++, arXiv 2311.12862)."""

from .conv.ops import sparse_conv
from .coordinates import Coordinates
from .geometry import ConvGeometry
from .kernel_map import KernelMap
from .pool.ops import sparse_max_pool, sparse_sum_pool
from .tensor import SparseTensor

__all__ = [
    "ConvGeometry",
    "Coordinates",
    "KernelMap",
    "SparseTensor",
    "sparse_conv",
    "sparse_max_pool",
    "sparse_sum_pool",
]
