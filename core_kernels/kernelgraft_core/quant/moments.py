"""What quantizers need to know of a linear layer's input: mean magnitudes and second moments of its channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kernelgraft_core.runtime.errors import NonFiniteError

from .ranks import all_sum

T = TypeVar("T")


class InputStatistics:
    """Sums over the tokens that a linear layer reads, gathered call by call in float32.

    Attributes:
        tokens: how many were seen.
    """

    def __init__(self, features: int, device: torch.device, *, second_moments: bool = True) -> None:
        self._absolute = torch.zeros(features, device=device)
        self._products = torch.zeros(features, features, device=device) if second_moments else None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take ``(..., K)`` inputs into account."""
        tokens = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self._absolute += tokens.abs().sum(0)
        if self._products is not None:
            self._products.addmm_(tokens.T, tokens)
        self.tokens += len(tokens)

    @property
    def mean_abs(self) -> Tensor:
        """``(K,)`` mean of ``|x|``."""
        return self._absolute / max(self.tokens, 1)

    def take_moments(self) -> Tensor:
        """``(K, K)`` mean of ``x x^T``, once: they are large, and divided where they lie.

        They give the mean squared error of any change of the weight without touching the tokens again.
        """
        if self._products is None:
            raise ValueError("second moments were not gathered, or have been taken")
        moments, self._products = self._products, None
        return moments.div_(max(self.tokens, 1))

    def gather(self) -> None:
        """Add up what all ranks have seen."""
        self.tokens = int(all_sum(torch.tensor(self.tokens, dtype=torch.float64)))
        all_sum(self._absolute)
        if self._products is not None:
            all_sum(self._products)

    def check(self, layer: str) -> None:
        """Raise NonFiniteError when a NaN or an infinity has passed through."""
        if not torch.isfinite(self._absolute).all():
            bad = int((~torch.isfinite(self._absolute)).sum())
            raise NonFiniteError(f"activations of {layer} are not finite in {bad} of {len(self._absolute)} channels")


def group_moments(moments: Tensor, group_size: int) -> Tensor:
    """The diagonal blocks ``(K / g, g, g)`` of moments ``(K, K)``, by which groups of weights are judged alone."""
    blocks = moments.view(len(moments) // group_size, group_size, -1, group_size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def relative_error(change: Tensor, weight: Tensor, moments: Tensor) -> float:
    """Squared error of a linear layer's output relative to its own square, for a change ``(N, K)`` of its weight."""
    return float(_energy(change, moments) / _energy(weight, moments).clamp(min=1e-30))


def _energy(weight: Tensor, moments: Tensor) -> Tensor:
    moments = moments.to(weight.dtype)
    # In parts: the products are as large as the weight.
    return torch.stack([((rows @ moments) * rows).sum() for rows in weight.split(1024)]).sum()


def within(items: Sequence[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Consecutive items ``(item, size)`` in lists of at most ``limit`` together, but at least one each."""
    taken: list[T] = []
    total = 0
    for item, size in items:
        if taken and total + size > limit:
            yield taken
            taken, total = [], 0
        taken.append(item)
        total += size
    if taken:
        yield taken
