"""4-bit integers packed in natural order: the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Pack the last axis, ``(..., c * w)`` integers in 0..15, to words ``(..., c)`` of ``dtype``, int16 or int32."""
    width = 2 * dtype.itemsize
    groups = values.unflatten(-1, (values.shape[-1] // width, width))
    packed = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=values.device)
    for place in range(width):
        packed |= groups[..., place].to(torch.int32) << (4 * place)
    return packed.to(dtype)


def unpack_nibbles(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`, uint8."""
    width = 2 * words.dtype.itemsize
    values = torch.empty(*words.shape, width, dtype=torch.uint8, device=words.device)
    for place in range(width):
        values[..., place] = (words >> (4 * place)) & 0xF
    return values.flatten(-2)
