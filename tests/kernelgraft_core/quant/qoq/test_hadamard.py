"""Hadamard matrices of every width that models have, and products with them by their factors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.qoq.hadamard import base_order, hadamard, hadamard_product
from kernelgraft_core.runtime import testing

RELAXED = settings(deadline=None, max_examples=25)  # other processes take their time too

# Widths of the residual streams and heads of published models, and orders of both constructions of Paley.
WIDTHS = {
    "powers of two": [1, 2, 4, 8, 64, 128, 256, 512, 1024, 2048, 4096],
    "models": [576, 640, 768, 896, 960, 1152, 1536, 1792, 2304, 2560, 2880, 3072, 3200, 3584, 4544, 5120],
    "heads": [80, 96, 112, 160, 192, 224],
    "first construction": [12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 132, 140, 152],
    "second construction": [28, 36, 52 * 2, 76 * 2, 100 * 2, 124 * 2],
}


@pytest.mark.parametrize("n", sorted({n for widths in WIDTHS.values() for n in widths}))
def test_rows_are_orthogonal_and_all_entries_as_large(n):
    signs = hadamard(n) * math.sqrt(n)
    assert torch.equal(signs.round().abs(), torch.ones(n, n, dtype=torch.float64))
    signs = signs.round()
    # Sums of so many signs are exact in float32.
    assert torch.equal(signs.float() @ signs.float().T, n * torch.eye(n))


@pytest.mark.parametrize(
    ("n", "base"), [(576, 36), (960, 60), (896, 28), (1536, 12), (2304, 36), (2560, 20), (3072, 12), (4096, 1)]
)
def test_bases_are_as_small_as_they_can_be(n, base):
    assert base_order(n) == base


@pytest.mark.parametrize("n", [0, -4, 3, 6, 9, 10, 25, 100, 2 * 47, 1_000_003])
def test_orders_without_a_construction_are_refused(n):
    for call in (base_order, hadamard):
        with pytest.raises(ValueError, match=rf"no Hadamard matrix of order {n} by"):
            call(n)


@RELAXED
@given(st.sampled_from([1, 12, 20, 28, 36, 44, 60]), st.integers(0, 5), st.integers(0, 4))
def test_products_by_factors_are_those_with_the_matrix(base, doublings, rows):
    n = base << doublings
    x = torch.randn(rows, 2, n, dtype=torch.float64, generator=testing.rng(n))
    torch.testing.assert_close(hadamard_product(x), x @ hadamard(n), rtol=1e-12, atol=1e-12)


def test_products_take_any_strides():
    x = torch.randn(48, 6, dtype=torch.float64)
    torch.testing.assert_close(hadamard_product(x.T), x.T @ hadamard(48), rtol=1e-12, atol=1e-12)
