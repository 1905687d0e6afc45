"""Hadamard matrices by the constructions of Sylvester and Paley: for every width that is a power of two times a base.

Bases are 1 and what Paley's two constructions give: ``q + 1`` for primes ``q = 3 mod 4``, ``2 (q + 1)`` for primes
``q = 1 mod 4``. No tables are needed for the widths of today's models.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST_BASE = 512


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthogonal matrix ``(n, n)`` with entries of magnitude ``1 / sqrt(n)``.

    Raises:
        ValueError: no construction known here gives one of that order.
    """
    return _signs(n).to(dtype) / math.sqrt(n)


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> Tensor:
    base = _base(n)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {n} by Sylvester's and Paley's constructions")
    matrix = _paley(base).to(torch.int8)
    doubling = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    for _ in range((n // base).bit_length() - 1):
        matrix = torch.kron(doubling, matrix)
    return matrix


def _base(n: int) -> int | None:
    """The smallest order that :func:`_paley` gives, of which ``n`` is a power of two times."""
    odd = n & -n if n > 0 else 0
    candidates = [n // (1 << power) for power in range(odd.bit_length())]
    return next((base for base in sorted(candidates) if base <= LARGEST_BASE and _order(base)), None)


def _order(n: int) -> tuple[int, bool] | None:
    """The prime, and whether it is Paley's second construction, that give order ``n``; ``(1, False)`` for 1."""
    if n == 1:
        return 1, False
    if n % 4 == 0 and _is_prime(n - 1):
        return n - 1, False
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return n // 2 - 1, True
    return None


def _paley(n: int) -> Tensor:
    order = _order(n)
    assert order is not None
    q, second = order
    if q == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    squares = {a * a % q for a in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if a in squares else -1.0 for a in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    jacobsthal = character[(index.unsqueeze(1) - index) % q]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 1:] = 1, jacobsthal
    identity = torch.eye(q + 1, dtype=torch.float64)
    if second:
        conference[1:, 0] = 1
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(identity, minus)
    conference[1:, 0] = -1
    return identity + conference


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
