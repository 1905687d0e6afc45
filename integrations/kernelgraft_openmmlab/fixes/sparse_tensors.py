"""mmcv's sparse tensors keep what they are given: a tensor as shape, which numpy cannot multiply, and any integers.

To make them dense, mmcv fills a grid with channels last and turns it over, which costs more than to fill it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from kernelgraft_core.runtime.patching import Patches
from kernelgraft_core.sparse import SparseTensor
from kernelgraft_openmmlab.sites import sites_of

LARGEST_STRIDE = 16  # of MinkUNet's four halvings


def _repair(patches: Patches, module: ModuleType) -> None:
    def make(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def __init__(
            self: Any, features: Any, indices: torch.Tensor, spatial_shape: Any, batch_size: Any, *args: Any, **kw: Any
        ) -> None:
            shape = [int(size) for size in spatial_shape]
            if isinstance(spatial_shape, torch.Tensor):
                # As far as the scans of a batch reach, in MinkUNet. Layers of stride 2 lose the last site of an odd
                # grid, so that a scan's result depended on what else is in the batch.
                shape = [-(-size // LARGEST_STRIDE) * LARGEST_STRIDE for size in shape]
            init(self, features, indices.to(torch.int32), shape, int(batch_size), *args, **kw)

        return __init__

    patches.wrap(module.SparseConvTensor, "__init__", make)
    patches.wrap(module.SparseConvTensor, "dense", _dense)


def _dense(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(theirs)
    def dense(self: Any, channels_first: bool = True) -> torch.Tensor:
        """``(B, C, *spatial_shape)``, contiguous; or with channels last."""
        if not channels_first or min(self.spatial_shape) < 1:
            return theirs(self, channels_first)
        sites = sites_of(self.indices, self.spatial_shape, self.batch_size)
        return SparseTensor(self.features, sites).to_dense()

    return dense


REPAIRS = {"mmcv.ops.sparse_structure": _repair}
