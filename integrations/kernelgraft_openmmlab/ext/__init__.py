"""The functions of ``mmcv._ext``, a module for each family, whose ``__all__`` has mmcv's names for what it provides."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .names import COMPILED_ON_CPU, NAMES

FAMILIES = (
    "batch_norm",
    "box_iou",
    "boxes3d",
    "build",
    "carafe",
    "deform_attention",
    "deform_conv",
    "grouping",
    "image",
    "losses",
    "nms",
    "psamask",
    "roi_align",
    "roi_points",
    "sampling",
    "sparse_conv",
    "voxelization",
)


__all__ = ["FAMILIES", "NAMES", "MissingOp", "extension", "provided"]


class MissingOp(NotImplementedError):
    """An op of mmcv that neither kernelgraft nor a compiled mmcv provides here."""


def extension(compiled: ModuleType | None = None) -> ModuleType:
    """A module that answers to ``mmcv._ext``, with every name that mmcv asks for.

    Args:
        compiled: the module of a compiled mmcv. It runs what it can; we run the ops that it lacks, and on a CPU those
            that it has for GPUs alone.
    """
    module = ModuleType("mmcv._ext", "mmcv's compiled ops, by kernelgraft.")
    ours, for_gpus = provided(), compiled is not None and _has_gpu_ops(compiled)
    for name in NAMES:
        theirs = getattr(compiled, name, None)
        if theirs is None:
            function = ours.get(name) or _missing(name)
        elif name not in ours or (for_gpus and name in COMPILED_ON_CPU):
            function = theirs
        else:
            function = _by_device(ours[name], theirs, on_cpu=name in COMPILED_ON_CPU, elsewhere=for_gpus)
        setattr(module, name, function)
    module.kernelgraft_ops = tuple(name for name in NAMES if name in ours)  # type: ignore[attr-defined]
    return module


@functools.cache
def provided() -> dict[str, Callable[..., Any]]:
    """Our functions by the names of mmcv."""
    found: dict[str, Callable[..., Any]] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"{__name__}.{family}")
        found |= {name: getattr(module, name) for name in module.__all__}
    return found


def _missing(name: str) -> Callable[..., Any]:
    def missing(*_: Any, **__: Any) -> Any:
        raise MissingOp(
            f"mmcv op {name!r} is not provided by kernelgraft: install a compiled mmcv (2.0 to 2.1; see mmcv's "
            "installation page), which kernelgraft then uses for it, or choose a config without this op"
        )

    missing.__name__ = name
    return missing


def _has_gpu_ops(compiled: ModuleType) -> bool:
    """Whether it was built for GPUs: mmcv builds for a CPU where it finds no CUDA."""
    version = getattr(compiled, "get_compiling_cuda_version", None)
    return version is None or version() != "not available"


def _by_device(
    ours: Callable[..., Any], theirs: Callable[..., Any], *, on_cpu: bool, elsewhere: bool
) -> Callable[..., Any]:
    """``theirs`` for tensors on a CPU, or elsewhere, as the flags say; ``ours`` otherwise."""

    @functools.wraps(ours)
    def choose(*args: Any, **kwargs: Any) -> Any:
        tensor = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
        can = on_cpu if tensor is None or tensor.device.type == "cpu" else elsewhere
        return (theirs if can else ours)(*args, **kwargs)

    return choose
