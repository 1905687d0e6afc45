"""What ``mmcv.utils.collect_env`` reports about the build."""

from __future__ import annotations

import torch

__all__ = ("get_compiler_version", "get_compiling_cuda_version")


def get_compiler_version() -> str:
    return "none: the ops are kernelgraft's"


def get_compiling_cuda_version() -> str:
    return torch.version.cuda or "not available"
