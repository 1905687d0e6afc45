"""Memory that CPU kernels work in, kept from call to call."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = 1 << 20  # bytes that a thread keeps for its next call
LINE = 64  # bytes of a cache line


class _Scratch(threading.local):
    """A thread that calls has its own memory, and keeps it when it is small."""

    def __init__(self) -> None:
        self.size, self.kept = 0, (torch.empty(0), 0)

    def reserve(self, size: int) -> tuple[Tensor, int]:
        """At least ``size`` bytes: what owns them, and the address, aligned to cache lines."""
        if size <= self.size:
            return self.kept
        memory = torch.empty(size + LINE, dtype=torch.uint8)
        reserved = memory, lines(memory.data_ptr())
        if size <= KEPT:
            self.size, self.kept = size, reserved
        return reserved


SCRATCH = _Scratch()


def lines(size: int) -> int:
    """Bytes, or an address, rounded up to whole cache lines."""
    return -(-size // LINE) * LINE


def laid_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where buffers of so many bytes lie behind each other, on cache lines, and where the last ends."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += lines(size)
    return places, end
