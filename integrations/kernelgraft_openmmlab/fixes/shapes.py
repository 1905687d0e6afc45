"""mmcv's sparse tensors keep what they are given: a tensor as shape, which numpy cannot multiply, and any integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from kernelgraft_core.runtime.patching import Patches


def _repair(patches: Patches, module: ModuleType) -> None:
    def make(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def __init__(
            self: Any, features: Any, indices: torch.Tensor, spatial_shape: Any, batch_size: Any, *args: Any, **kw: Any
        ) -> None:
            shape = [int(size) for size in spatial_shape]
            init(self, features, indices.to(torch.int32), shape, int(batch_size), *args, **kw)

        return __init__

    patches.wrap(module.SparseConvTensor, "__init__", make)


REPAIRS = {"mmcv.ops.sparse_structure": _repair}
