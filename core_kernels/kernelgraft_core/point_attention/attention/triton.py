"""Attention in groups on a GPU: rows are gathered by the kernels, and nothing waits for a number of the GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernelgraft_core.sparse.conv.triton import precision

from . import batched
from .triton_kernels import attention_kernel, key_gradient_kernel, query_gradient_kernel

LARGEST_HEAD = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a program, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int = 2


def tile_for(head_block: int, number: int, backward: bool = False) -> Tile:
    """For heads of ``head_block`` channels, of numbers of ``number`` bytes.

    Small blocks: a group of 69 fills three blocks of 32 to 72 %, one of 128 to 54 %. With heads of 16 channels the loop
    is exponentials most of all, which larger blocks would not spare.
    """
    if number == 4 and backward:
        return Tile(16, 16, 4 if head_block > 32 else 2)
    if head_block > 64 and (backward or number == 4):
        return Tile(16, 16, 2)
    return Tile(32, 32, 4 if number == 4 or head_block > 32 else 2)


def constants(head_size: int, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "HEAD": head_size,
        "HEAD_BLOCK": max(16, triton.next_power_of_2(head_size)),
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "PRECISION": precision(dtype),
    }


def grouped_attention(qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int) -> Tensor:
    channels = qkv.shape[1] // 3
    out = qkv.new_empty((len(qkv), channels))
    if not len(qkv):
        return out
    qkv, members, starts, owned = (each.contiguous() for each in (qkv, members, starts, owned))
    head_size = channels // heads
    tile = tile_for(triton.next_power_of_2(head_size), qkv.element_size())
    with torch.cuda.device_of(qkv):
        attention_kernel[len(owned), heads, triton.cdiv(size, tile.queries)](
            qkv, members, starts, owned, out, channels, math.log2(math.e) * head_size**-0.5,
            **constants(head_size, tile, qkv.dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def grouped_attention_grad(
    grad: Tensor, qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int
) -> Tensor:
    found = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if not len(qkv):
        return found
    grad, qkv, members, starts, owned = (each.contiguous() for each in (grad, qkv, members, starts, owned))
    channels, places = qkv.shape[1] // 3, len(members)
    head_size, direct = channels // heads, places == len(qkv)  # then no row is a member of two groups
    tile = tile_for(triton.next_power_of_2(head_size), qkv.element_size(), backward=True)
    sums, deltas = (torch.empty((heads, places), dtype=torch.float32, device=qkv.device) for _ in range(2))
    # Gradients of what is borrowed are added to those of what is owned, in a settled order.
    parts = found[:, channels:] if direct else grad.new_zeros((places, 2 * channels), dtype=torch.float32)
    told, scale = (grad, qkv, members, starts, owned), math.log2(math.e) * head_size**-0.5
    options = constants(head_size, tile, qkv.dtype) | {"num_warps": tile.warps, "num_stages": tile.stages}
    with torch.cuda.device_of(qkv):
        query_gradient_kernel[len(owned), heads, triton.cdiv(size, tile.queries)](
            *told, found, sums, deltas, channels, scale, places, **options
        )
        key_gradient_kernel[len(owned), heads, triton.cdiv(size, tile.keys)](
            *told, parts, parts[:, channels:], sums, deltas, channels, scale, places, parts.stride(0), **options,
            DIRECT=direct,
        )  # fmt: skip
    if not direct:
        total = parts.new_zeros((len(qkv), 2 * channels)).index_put_((members,), parts, accumulate=True)
        found[:, channels:] = total
    return found


# Projections are dense products, which torch's libraries do best; attention between them is dispatched to the above.
grouped_self_attention = batched.grouped_self_attention


def supports_grouped_attention(qkv: Tensor, *rest: object) -> str | None:
    heads = rest[-2]
    assert isinstance(heads, int)
    return _unsupported(qkv, qkv.shape[1] // 3 // heads)


def supports_grouped_attention_grad(grad: Tensor, qkv: Tensor, *rest: object) -> str | None:
    return supports_grouped_attention(qkv, *rest)


def supports_grouped_self_attention(x: Tensor, *rest: object) -> str | None:
    heads = rest[-2]
    assert isinstance(heads, int)
    return _unsupported(x, x.shape[1] // heads)


def _unsupported(x: Tensor, head_size: int) -> str | None:
    if x.dtype not in DTYPES:
        return f"{x.dtype} is left to the other backends"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "compute capability is below 8.0"
    return f"a head has {head_size} channels, more than {LARGEST_HEAD}" if head_size > LARGEST_HEAD else None
