"""The map of the opposite direction, kept beside a kernel map: for gradients and for inverse convolutions."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core.runtime.derived import Derived

from .ops import sparse_transpose

_known: Derived[Tensor] = Derived()


def exchanged(neighbors: Tensor, rows: int) -> Tensor:
    """What :func:`sparse_transpose` gives, made once."""
    return _known.of((neighbors,), lambda: sparse_transpose(neighbors, rows))
