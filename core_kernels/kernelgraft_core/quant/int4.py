"""4-bit integers packed eight to an int32 word, in the interleaved order of :mod:`kernelgraft_core.quant.interleave`.

Nibble ``i`` of word ``c`` holds element ``8 * c + INTERLEAVED[i]``. Masking a word with ``0x000F000F`` after a shift by
``4 * i`` therefore leaves two neighbours, elements ``2 * i`` and ``2 * i + 1``, in its two 16-bit halves.
AutoAWQ's GEMM checkpoints use the same order (along the other axis of the matrix).
"""

from __future__ import annotations

from torch import Tensor

from .interleave import check_values, pack_fields, unpack_fields

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
    check_values(values, 8, 15)
    return pack_fields(values, 4)


def unpack_int4(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: int32 ``(..., c)`` to uint8 ``(..., 8 * c)``.

    Raises:
        ValueError: the words are not int32.
    """
    return unpack_fields(words, 4)
