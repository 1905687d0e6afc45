"""mmengine's checkpoints hold log and schedules beside the weights, which ``torch.load`` refuses since torch 2.6.

The named types of those are allowed, while mmengine loads a checkpoint and no longer; nothing else is unpickled.
"""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from kernelgraft_core.runtime.patching import Patches

KINDS = ["e", "f", "d", "b", "h", "i", "q", "l", "B", "H", "I", "Q", "L", "?", "U", "S"]


def allowed_types() -> list[Any]:
    """What a checkpoint of mmengine is made of besides tensors: log, schedules, and numpy's arrays and numbers."""
    multiarray = importlib.import_module(f"numpy.{_core()}.multiarray")
    functions = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (multiarray._reconstruct, multiarray.scalar)
        for core in ("core", "_core")  # numpy 1 and 2
    ]
    dtypes = [type(np.dtype(kind)) for kind in KINDS]
    # They name functions of their own by getattr, which would open everything: it is one that knows these alone.
    return [*_functions(), np.ndarray, np.dtype, *dtypes, *functions, (_function_of, "builtins.getattr")]


def _core() -> str:
    """Where numpy keeps itself: numpy 2 has it under another name."""
    return "core" if int(np.__version__.partition(".")[0]) < 2 else "_core"


def _functions() -> dict[Any, tuple[str, ...]]:
    """The types whose functions a checkpoint may name."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    return {
        HistoryBuffer: ("min", "max", "mean", "current"),
        OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
    }


def _function_of(owner: Any, name: str) -> Any:
    """What ``getattr`` is in a checkpoint: a statistic of the log, or the form of a schedule.

    Raises:
        pickle.UnpicklingError: it is asked for anything else.
    """
    if not isinstance(owner, type) or name not in _functions().get(owner, ()):
        raise pickle.UnpicklingError(f"{name!r} of {owner!r} is no function that checkpoints of mmengine name")
    return getattr(owner, name)


def _repair(patches: Patches, module: ModuleType) -> None:
    def make(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with torch.serialization.safe_globals(allowed_types()):
                return load(*args, **kwargs)

        return load_checkpoint

    patches.wrap(module.CheckpointLoader, "load_checkpoint", make)


REPAIRS = {"mmengine.runner.checkpoint": _repair}
