"""Small unsigned fields packed into int32 words, in the interleaved order that 16-bit SIMD unpacks for free.

A word holds ``32 / b`` fields of ``b`` bits, 1, 2 or 4: element ``2 * f + h`` (``h`` 0 or 1) at bit ``b * f + 16 * h``.
A shift by ``b * f`` and a mask therefore leave two neighbours, elements ``2 * f`` and ``2 * f + 1``, in the two 16-bit
halves of a word.
"""

from __future__ import annotations

import torch
from torch import Tensor


def field_shift(element: int, bits: int) -> int:
    """The bit at which an element of a word begins."""
    return bits * (element // 2) + 16 * (element % 2)


def check_values(values: Tensor, multiple: int, largest: int) -> None:
    """Refuse what does not pack.

    Raises:
        ValueError: the last axis is not a multiple of ``multiple``, or a value is not in 0..``largest``.
    """
    if values.shape[-1] % multiple:
        raise ValueError(f"cannot pack {values.shape[-1]} values: not a multiple of {multiple}")
    if values.numel() and (values.min() < 0 or values.max() > largest):
        raise ValueError(f"values span {int(values.min())}..{int(values.max())}, expected 0..{largest}")


def pack_fields(values: Tensor, bits: int) -> Tensor:
    """Pack the last axis, ``(..., 32 / bits * c)`` integers below ``2 ** bits``, to int32 ``(..., c)``."""
    groups = values.unflatten(-1, (values.shape[-1] * bits // 32, 32 // bits))
    packed = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=values.device)
    for element in range(32 // bits):
        packed |= groups[..., element].to(torch.int32) << field_shift(element, bits)
    return packed


def unpack_fields(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_fields`: int32 ``(..., c)`` to uint8 ``(..., 32 / bits * c)``.

    Raises:
        ValueError: the words are not int32.
    """
    if words.dtype != torch.int32:
        raise ValueError(f"packed words are {words.dtype}, expected torch.int32")
    values = torch.empty(*words.shape, 32 // bits, dtype=torch.uint8, device=words.device)
    for element in range(32 // bits):
        values[..., element] = (words >> field_shift(element, bits)) & ((1 << bits) - 1)
    return values.flatten(-2)
