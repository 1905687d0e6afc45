"""Hadamard matrices by the constructions of Sylvester and Paley: for every width that is a power of two times a base.

Bases are 1 and what Paley's two constructions give: ``q + 1`` for primes ``q = 3 mod 4``, ``2 (q + 1)`` for primes
``q = 1 mod 4``. No tables are needed for the widths of today's models.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST_BASE = 2048


def hadamard(n: int) -> Tensor:
    """An orthogonal matrix ``(n, n)`` with entries of magnitude ``1 / sqrt(n)``, float64.

    Raises:
        ValueError: no construction known here gives one of that order.
    """
    base = base_order(n)
    return torch.kron(_sylvester(n // base), _paley(base)) / math.sqrt(n)


def hadamard_product(x: Tensor) -> Tensor:
    """``x @ hadamard(n)`` for ``x`` ``(..., n)`` float64, by its factors: far less work than the matrix takes.

    Raises:
        ValueError: as for :func:`hadamard`.
    """
    n = x.shape[-1]
    base = base_order(n)
    doublings = (n // base).bit_length() - 1
    outer = 1 << doublings // 2
    inner = n // base // outer
    product = x.reshape(-1, base) @ _paley(base).to(x.device)
    # Sylvester's matrices are symmetric, and the large one is the Kronecker product of two small ones.
    product = _sylvester(inner).to(x.device) @ product.view(-1, inner, base)
    product = _sylvester(outer).to(x.device) @ product.view(-1, outer, inner * base)
    return product.view_as(x) / math.sqrt(n)


def base_order(n: int) -> int:
    """The smallest order by Paley of which ``n`` is a power of two times.

    Raises:
        ValueError: there is none.
    """
    twos = (n & -n).bit_length() if n > 0 else 0
    orders = [n >> power for power in reversed(range(twos))]
    found = next((order for order in orders if order <= LARGEST_BASE and _prime_of(order) is not None), None)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n} by Sylvester's and Paley's constructions")
    return found


def _prime_of(order: int) -> tuple[int, bool] | None:
    """The prime that gives an order, and whether by Paley's second construction; ``(1, False)`` for order 1."""
    if order == 1:
        return 1, False
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1, False
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return order // 2 - 1, True
    return None


def _sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    doubling = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(doubling, matrix)
    return matrix


@functools.lru_cache(maxsize=8)
def _paley(order: int) -> Tensor:
    found = _prime_of(order)
    assert found is not None
    q, second = found
    if q == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    squares = {a * a % q for a in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if a in squares else -1.0 for a in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1, 1 if second else -1
    conference[1:, 1:] = character[(index.unsqueeze(1) - index) % q]
    identity = torch.eye(q + 1, dtype=torch.float64)
    if not second:
        return identity + conference
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(identity, minus)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
