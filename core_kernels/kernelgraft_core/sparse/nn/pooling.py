"""Pooling layers, over kernels and over whole grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.pool.ops import sparse_max_pool, sparse_sum_pool
from kernelgraft_core.sparse.tensor import SparseTensor

Sizes = int | Sequence[int]


class _Pool(nn.Module):
    """Over the sites that are there; outputs where there is one.

    Args:
        kernel_size, stride, padding, dilation: one number, or one for each axis of the tensors that come; ``stride`` is
            the size of the kernel unless given.
    """

    def __init__(
        self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding, self.dilation = kernel_size, padding, dilation
        self.stride = kernel_size if stride is None else stride

    def forward(self, x: SparseTensor) -> SparseTensor:
        geometry = ConvGeometry.of(x.coordinates.dimensions, self.kernel_size, self.stride, self.padding, self.dilation)
        known = KernelMap.of(geometry, x.coordinates)
        return SparseTensor(self._pool(x.feats, known.neighbors), known.outputs)

    def _pool(self, feats: Tensor, neighbors: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxPool(_Pool):
    __doc__ = f"The largest of each channel. {_Pool.__doc__}"

    def _pool(self, feats: Tensor, neighbors: Tensor) -> Tensor:
        return sparse_max_pool(feats, neighbors)


class AvgPool(_Pool):
    __doc__ = f"The mean of each channel. {_Pool.__doc__}"

    def _pool(self, feats: Tensor, neighbors: Tensor) -> Tensor:
        return average_pool(feats, neighbors)


def average_pool(feats: Tensor, neighbors: Tensor) -> Tensor:
    """Means of the rows that each output reads, summed in float32 at least; 0 where it reads none."""
    counts = (neighbors >= 0).sum(1, keepdim=True).clamp_(min=1)
    wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
    return (sparse_sum_pool(wide, neighbors) / counts).to(feats.dtype)


class GlobalPool(nn.Module):
    """One row ``(batch_size, C)`` for each grid: its ``"max"``, ``"mean"`` or ``"sum"``; 0 for one without sites.

    Raises:
        ValueError: ``reduce`` is none of them.
    """

    def __init__(self, reduce: str = "mean") -> None:
        super().__init__()
        if reduce not in ("max", "mean", "sum"):
            raise ValueError(f"reduce is {reduce!r}, expected 'max', 'mean' or 'sum'")
        self.reduce = reduce

    def forward(self, x: SparseTensor) -> Tensor:
        grid = x.coords[:, 0].long()
        order = None if bool((grid[1:] >= grid[:-1]).all()) else grid.argsort(stable=True)
        lengths = torch.bincount(grid, minlength=x.batch_size)
        feats = x.feats if order is None else x.feats[order]
        wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
        found = torch.segment_reduce(wide, self.reduce, lengths=lengths, axis=0)
        return torch.where((lengths > 0).unsqueeze(1), found, 0).to(feats.dtype)

    def extra_repr(self) -> str:
        return self.reduce
