"""Arguments for the op of linear layers, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

TUNED: tuple[str, ...] = ()


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for the op by its name, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = (200, 64), (96, 64), (96,)
    tensors = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return {"row_linear": tuple(tensors)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of larger linear layers."""
