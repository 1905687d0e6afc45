"""Weights in the order in which the CPU kernels of W4A8 and W8A8 read them; see :mod:`.cpu_tile`."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cpu_tile import ByteSet

BYTES, NIBBLES, GROUPS, GROUP_SUMS = range(4)  # the last is another way to multiply the one before it
ROWS = 16  # of a panel
TOGETHER = 32  # rows that kernels may do together: weights are padded to whole multiples


@dataclass(frozen=True)
class Panels:
    """A weight as :mod:`.cpu_kernels` takes it.

    Attributes:
        form: BYTES, NIBBLES or GROUPS.
        rows: N.
        addresses: number of groups, then where words, row scales, group scales, group zeros and zero points are.
        owners: tensors that the addresses point to.
    """

    form: int
    rows: int
    addresses: tuple[int, ...]
    owners: tuple[Tensor, ...]

    @property
    def groups(self) -> int:
        return self.addresses[0]


def panels_of_bytes(int8: Tensor, scale: Tensor) -> Panels:
    """Of int8 ``(N, K)``, with the scale ``(N,)`` of each row."""
    n, k = int8.shape
    rows, columns = -(-n // TOGETHER) * TOGETHER, -(-k // 8) * 8
    words = torch.full((rows, columns), 128, dtype=torch.uint8)
    words[:n, :k] = (int8.to(torch.int16) + 128).to(torch.uint8)
    words = words.view(rows // ROWS, ROWS, columns // 4, 4).transpose(1, 2).contiguous()
    scale = scale.contiguous()
    return Panels(BYTES, n, (1, words.data_ptr(), scale.data_ptr(), 0, 0, 0), (words, scale))


def arrange_nibbles(qweight: Tensor) -> Tensor:
    """Packed ``(N, K / 2)`` to panels ``(N / 16, K / 8, 16, 4)``, N rounded up to whole multiples of 32 with zeros."""
    n, half = qweight.shape
    rows = -(-n // TOGETHER) * TOGETHER
    padded = qweight.new_zeros(rows, half)
    padded[:n] = qweight
    q = torch.stack((padded & 15, padded >> 4), -1).view(rows // ROWS, ROWS, half // 4, 2, 4)
    return (q[..., 0, :] | (q[..., 1, :] << 4)).transpose(1, 2).contiguous()


def nibbles_of(panels: Tensor, rows: int) -> Tensor:
    """What :func:`arrange_nibbles` was given, for a weight of ``rows``."""
    flat = panels.transpose(1, 2).flatten(0, 1)  # rows, K / 8, 4
    q = torch.cat((flat & 15, flat >> 4), -1).flatten(1)[:rows]
    return q[:, ::2] | (q[:, 1::2] << 4)


def arrange_groups(values: Tensor) -> Tensor:
    """Scales or zero points ``(N, G)`` to ``(N / 32, G, 32)``, with ones for rows that are not there."""
    n, groups = values.shape
    padded = values.new_ones(-(-n // TOGETHER) * TOGETHER, groups)
    padded[:n] = values
    return padded.view(-1, TOGETHER, groups).transpose(1, 2).contiguous()


def groups_of(arranged: Tensor, rows: int) -> Tensor:
    """What :func:`arrange_groups` was given, for a weight of ``rows``."""
    return arranged.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


@functools.cache
def byte_set() -> ByteSet | None:
    """How this processor multiplies bytes, or None where no kernel of ours runs: without numba, or on another kind."""
    if importlib.util.find_spec("numba") is None:
        return None
    from kernelgraft_core.runtime.cpu_vectors import instruction_set

    from .cpu_tile import BYTE_SETS

    here = instruction_set().name
    name = "avx2" if here == "avx512" else here
    return next((known for known in BYTE_SETS if known.isa.name == name), None)
