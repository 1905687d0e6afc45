"""Two normalizations with a feed-forward network between them on a GPU, in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernelgraft_core.sparse.conv.triton import precision

from .triton_kernels import norm_ffn_kernel

LARGEST = 256  # channels: a row is held in registers whole


@dataclass(frozen=True)
class Tile:
    """Rows and hidden channels at a time of a program, and how it is compiled."""

    rows: int
    inner: int
    warps: int
    stages: int


def tile_for(channels: int) -> Tile:
    """For rows of ``channels``."""
    if channels <= 64:
        return Tile(64, 64, 4, 3)
    return Tile(64, 32, 8, 3) if channels <= 128 else Tile(32, 32, 8, 2)


def constants(channels: int, hidden: int, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel is compiled for."""
    block = max(16, triton.next_power_of_2(channels))
    return {
        "ROWS": tile.rows,
        "CHANNELS": block,
        "INNER": tile.inner,
        "WHOLE": block == channels and hidden % tile.inner == 0,
        "PRECISION": precision(dtype),
    }


def norm_ffn(
    x: Tensor,
    update: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float,
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not len(x):
        return out
    tensors = (
        x,
        update,
        norm1_weight,
        norm1_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        norm2_weight,
        norm2_bias,
    )
    (count, channels), hidden = x.shape, len(fc1_weight)
    tile = tile_for(channels)
    with torch.cuda.device_of(x):
        norm_ffn_kernel[(triton.cdiv(count, tile.rows),)](
            *(each.contiguous() for each in tensors), out, count, channels, hidden, eps,
            **constants(channels, hidden, tile, x.dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def supports_norm_ffn(x: Tensor, *_: object) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype} is left to the other backends, whose products are as good"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "compute capability is below 8.0"
    return f"x has {x.shape[1]} channels, more than {LARGEST}" if x.shape[1] > LARGEST else None
