"""4-bit integers packed eight to an int32 word, in the interleaved order that 16-bit SIMD unpacks for free.

Nibble ``i`` of word ``c`` holds element ``8 * c + INTERLEAVED[i]``. Masking a word with ``0x000F000F`` after a shift by
``4 * i`` therefore leaves two neighbours, elements ``2 * i`` and ``2 * i + 1``, in its two 16-bit halves.
AutoAWQ's GEMM checkpoints use the same order (along the other axis of the matrix).
"""

from __future__ import annotations

import torch
from torch import Tensor

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_int4(values: Tensor) -> Tensor:
    """Pack the last axis, eight values to a word.

    Args:
        values: ``(..., 8 * c)`` integers in 0..15, any integer dtype.

    Returns:
        int32 ``(..., c)``.

    Raises:
        ValueError: the last axis is not a multiple of 8, or a value does not fit in four bits.
    """
    if values.shape[-1] % 8:
        raise ValueError(f"cannot pack {values.shape[-1]} values: not a multiple of 8")
    if values.numel() and (values.min() < 0 or values.max() > 15):
        raise ValueError(f"values span {int(values.min())}..{int(values.max())}, expected 0..15")
    groups = values.unflatten(-1, (-1, 8))
    packed = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=values.device)
    for nibble, element in enumerate(INTERLEAVED):
        packed |= groups[..., element].to(torch.int32) << (4 * nibble)
    return packed


def unpack_int4(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: int32 ``(..., c)`` to uint8 ``(..., 8 * c)``.

    Raises:
        ValueError: the words are not int32.
    """
    if words.dtype != torch.int32:
        raise ValueError(f"packed words are {words.dtype}, expected torch.int32")
    values = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for nibble, element in enumerate(INTERLEAVED):
        values[..., element] = (words >> (4 * nibble)) & 0xF
    return values.flatten(-2)
