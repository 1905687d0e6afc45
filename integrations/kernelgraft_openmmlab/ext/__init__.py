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
    ours = provided()
    for name in NAMES:
        theirs = getattr(compiled, name, None)
        if theirs is None:
            function = ours.get(name) or _missing(name)
        elif name in ours and name not in COMPILED_ON_CPU:
            function = _by_device(name, ours[name], theirs)
        else:
            function = theirs
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


def _by_device(name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def choose(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        on_cpu = bool(tensors) and tensors[0].device.type == "cpu"
        return (ours if on_cpu else theirs)(*args, **kwargs)

    return choose
