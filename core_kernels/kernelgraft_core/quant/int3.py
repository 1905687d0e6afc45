"""3-bit integers in two planes of int32 words: the two low bits, and the top bit.

Three bits do not divide a word; 2 and 1 do. Both planes have the interleaved order of
:mod:`kernelgraft_core.quant.interleave`, so each unpacks like :mod:`kernelgraft_core.quant.int4`:

* ``low``: word ``c`` holds elements ``16 * c`` to ``16 * c + 15``; ``(word >> 2 * f) & 0x00030003`` leaves the low bits
  of elements ``2 * f`` and ``2 * f + 1`` in the two 16-bit halves.
* ``high``: word ``c`` holds elements ``32 * c`` to ``32 * c + 31``; ``((word >> f) & 0x00010001) << 2`` leaves the top
  bits of elements ``2 * f`` and ``2 * f + 1`` in their places above.

Either plane can be cut in units of 32 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interleave import check_values, pack_fields, unpack_fields


def pack_int3(values: Tensor) -> tuple[Tensor, Tensor]:
    """Pack the last axis.

    Args:
        values: ``(..., 32 * c)`` integers in 0..7, any integer dtype.

    Returns:
        The planes ``low`` int32 ``(..., 2 * c)`` and ``high`` int32 ``(..., c)``.

    Raises:
        ValueError: the last axis is not a multiple of 32, or a value does not fit in three bits.
    """
    check_values(values, 32, 7)
    values = values.to(torch.uint8)
    return pack_fields(values & 3, 2), pack_fields(values >> 2, 1)


def unpack_int3(low: Tensor, high: Tensor) -> Tensor:
    """The inverse of :func:`pack_int3`: the planes to uint8 ``(..., 32 * c)``.

    Raises:
        ValueError: the words are not int32, or ``low`` has not two words for each of ``high``.
    """
    if low.shape != (*high.shape[:-1], 2 * high.shape[-1]):
        raise ValueError(f"low is {tuple(low.shape)} and high {tuple(high.shape)}, expected twice as many low words")
    return unpack_fields(low, 2) | unpack_fields(high, 1) << 2
