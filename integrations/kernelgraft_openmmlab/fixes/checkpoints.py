"""mmengine's checkpoints hold its training log beside the weights, which ``torch.load`` refuses since torch 2.6.

The named types of that log are allowed, while mmengine loads a checkpoint and no longer; nothing else is unpickled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from kernelgraft_core.runtime.patching import Patches


def allowed_types() -> list[Any]:
    """What a checkpoint of mmengine is made of besides tensors: its log, and numpy's arrays and numbers."""
    from mmengine.logging.history_buffer import HistoryBuffer

    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    arrays = [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype]
    named = [(each, f"numpy.{core}.multiarray.{each.__name__}") for each in arrays[:2] for core in ("core", "_core")]
    kinds = [
        type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U1")
    ]
    return [HistoryBuffer, *arrays[2:], *named, *kinds]


def _repair(patches: Patches, module: ModuleType) -> None:
    def make(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with torch.serialization.safe_globals(allowed_types()):
                return load(*args, **kwargs)

        return load_checkpoint

    patches.wrap(module.CheckpointLoader, "load_checkpoint", make)


REPAIRS = {"mmengine.runner.checkpoint": _repair}
