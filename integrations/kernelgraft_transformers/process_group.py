"""The process group that ``torchrun`` describes, and the device of this process in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Place:
    """Where this process computes, and whether it is the one that writes and reports."""

    device: torch.device
    leads: bool


@contextmanager
def process_group(device: str = "auto") -> Iterator[Place]:
    """Join the group of a ``torchrun`` launch, or be alone; it ends with the block.

    Args:
        device: ``auto`` is a GPU of this process's own where there is one, else the CPU.

    Raises:
        ValueError: PyTorch does not know the device, or does not have it.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Place(choose_device(device), True)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(f"cuda:{local}" if device == "auto" and torch.cuda.is_available() else device)
    # Sums of float64 numbers and of moments: gloo takes CPU tensors, NCCL those of GPUs.
    distributed.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield Place(chosen, distributed.get_rank() == 0)
    finally:
        distributed.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """A device by name; ``auto`` is the GPU where there is one.

    Raises:
        ValueError: PyTorch does not know the device or does not have it, or it is neither a CPU nor a CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not one that PyTorch knows") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one that models are quantized on; those are auto, cpu and cuda")
    return device
