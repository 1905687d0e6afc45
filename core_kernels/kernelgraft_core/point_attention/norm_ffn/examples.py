"""Arguments for the op of two normalizations around a feed-forward network, for reports and tests over all ops."""

from __future__ import annotations

from typing import Any

import torch

TUNED: tuple[str, ...] = ()
ROWS, CHANNELS, HIDDEN = 130, 64, 128


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for the op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator, c, h = torch.Generator().manual_seed(0), CHANNELS, HIDDEN
    shapes = (ROWS, c), (ROWS, c), (c,), (c,), (h, c), (h,), (c, h), (c,), (c,), (c,)
    scales = 1, 1, 1, 1, c**-0.5, 1, h**-0.5, 1, 1, 1
    tensors = (
        torch.randn(s, generator=generator).mul(f).to(device, dtype) for s, f in zip(shapes, scales, strict=True)
    )
    return {"norm_ffn": (*tensors, 1e-5)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers; see ``benchmarks/flatformer_cases.py``."""
