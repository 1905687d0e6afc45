"""Sparse convolution on point clouds and other grids that are mostly empty (TorchSparse++, arXiv 2311.12862)."""

from . import layouts, models, nn
from .conv.ops import sparse_conv
from .coordinates import Coordinates
from .geometry import ConvGeometry
from .kernel_map import KernelMap
from .pair_gemm.ops import pair_gemm
from .pool.ops import sparse_max_pool, sparse_sum_pool
from .relational import RelationalConv
from .tensor import SparseTensor
from .tuner import TuneResult, tune
from .voxels import devoxelize, voxelize
from .watching import kernel_maps

__all__ = [
    "ConvGeometry",
    "Coordinates",
    "KernelMap",
    "RelationalConv",
    "SparseTensor",
    "TuneResult",
    "devoxelize",
    "kernel_maps",
    "layouts",
    "models",
    "nn",
    "pair_gemm",
    "sparse_conv",
    "sparse_max_pool",
    "sparse_sum_pool",
    "tune",
    "voxelize",
]
