"""How a token's key and value lie in a cache: one row of bytes for each token and key-value head.

A row of head size D has D + 8 bytes: the key's D/2, the value's D/2 (the even channel is the low half of a byte), then
four float16: scale and low of the key, scale and low of the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import dequantize_kv, quantize_kv

SCALE_BYTES = 8  # two float16 for the key, two for the value


def kv4_row_bytes(head_size: int) -> int:
    """Bytes of one token and one key-value head.

    Raises:
        ValueError: the head size is odd or below 2.
    """
    if head_size < 2 or head_size % 2:
        raise ValueError(f"head size is {head_size}, expected an even number of at least 2")
    return head_size + SCALE_BYTES


def new_cache(
    num_blocks: int, kv_heads: int, block_size: int, head_size: int, device: torch.device | str | None = None
) -> Tensor:
    """An empty cache for ``num_blocks * block_size`` tokens: uint8 ``(num_blocks, kv_heads, block_size, D + 8)``.

    Raises:
        ValueError: a size is negative, or the head size is odd.
    """
    shape = (num_blocks, kv_heads, block_size, kv4_row_bytes(head_size))
    if min(shape) < 0:
        raise ValueError(f"a cache of {shape} was asked for, expected no negative size")
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def pack_rows(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values ``(..., D)`` to rows, uint8 ``(..., D + 8)``."""
    (key_bytes, key_scales), (value_bytes, value_scales) = _pack(key), _pack(value)
    scales = torch.cat((key_scales, value_scales), -1)
    return torch.cat((key_bytes, value_bytes, scales.view(torch.uint8)), -1)


def unpack_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What rows ``(..., D + 8)`` stand for: keys and values ``(..., D)``."""
    d = rows.shape[-1] - SCALE_BYTES
    key_bytes, value_bytes = rows[..., : d // 2], rows[..., d // 2 : d]
    # Not contiguous(), which leaves one row as it is: a view as float16 needs an even address.
    scales = rows[..., d:].clone(memory_format=torch.contiguous_format).view(torch.float16)
    key = dequantize_kv(_integers(key_bytes), scales[..., 0], scales[..., 1], dtype)
    return key, dequantize_kv(_integers(value_bytes), scales[..., 2], scales[..., 3], dtype)


def _pack(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale, low = quantize_kv(x)
    return q[..., ::2] | (q[..., 1::2] << 4), torch.stack((scale, low), -1)


def _integers(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
