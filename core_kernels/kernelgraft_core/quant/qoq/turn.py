"""Orthogonal changes of basis: what the residual stream and the channels of heads are turned by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .hadamard import base_order, hadamard_product

ROWS = 4096  # that are turned at once, in float64


class Turn:
    """An orthogonal matrix ``Q`` ``(n, n)`` whose entries are all about as large, applied by its factors in float64.

    Args:
        width: n.
        centred: ``Q`` leaves the vector of ones as it is, so that a turned row has the mean that it had before. It is a
            Hadamard matrix with signs drawn for its rows and columns, followed by the reflection that brings the image
            of that vector back. Without, ``Q`` is the Hadamard matrix.

    Raises:
        ValueError: no Hadamard matrix of that order is known (:func:`~.hadamard.hadamard`).
    """

    def __init__(self, width: int, *, centred: bool = False) -> None:
        base_order(width)
        self.width = width
        self._centring: tuple[Tensor, Tensor, Tensor] | None = None
        if centred:
            drawn = torch.randint(0, 2, (2, width), generator=torch.Generator().manual_seed(width))
            before, behind = drawn.double() * 2 - 1
            ones = torch.full_like(before, 1 / math.sqrt(width))
            mirror = hadamard_product(ones * before) * behind - ones
            # Nothing is mirrored where the image is there already.
            self._centring = before, behind, mirror / mirror.norm().clamp(min=1e-12)

    def rows(self, x: Tensor) -> Tensor:
        """``x @ Q`` for ``x`` ``(..., n)``, in its dtype."""
        parts = x.reshape(-1, self.width).split(ROWS)
        return torch.cat([self._product(part.double()).to(x.dtype) for part in parts]).view_as(x)

    def columns(self, weight: Tensor) -> Tensor:
        """``Q.T @ weight`` for ``weight`` ``(n, K)``, in its dtype."""
        return self.rows(weight.T).T.contiguous()

    def _product(self, x: Tensor) -> Tensor:
        if self._centring is None:
            return hadamard_product(x)
        before, behind, mirror = (vector.to(x.device) for vector in self._centring)
        turned = hadamard_product(x * before) * behind
        return turned - torch.outer(turned @ mirror, 2 * mirror)
