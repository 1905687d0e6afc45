"""Grids that make up for each other: the error of whole rows falls, and each step is the best of its candidates."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.awq.clip import search_grid
from kernelgraft_core.quant.awq.refine import refine_grid
from kernelgraft_core.quant.moments import group_moments
from kernelgraft_core.quant.rounding import RATIOS, SHIFTS, Grid, Scheme, nearest_grid

RELAXED = settings(deadline=None, max_examples=25)  # other processes take their time too

N, G, SIZE, TOKENS = 6, 3, 16, 40
SCHEMES = [
    pytest.param(Scheme(bits, SIZE, symmetric), id=f"int{bits}-{'symmetric' if symmetric else 'asymmetric'}")
    for bits in (3, 4)
    for symmetric in (False, True)
]


def case(seed=0, dtype=torch.float64, shared=1.0):
    """Weights ``(N, G, g)`` and moments ``(K, K)`` of inputs that share a cause across all groups."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(N, G, SIZE, generator=generator, dtype=dtype)
    tokens = torch.randn(TOKENS, G * SIZE, generator=generator, dtype=dtype)
    tokens += shared * torch.randn(TOKENS, 1, generator=generator, dtype=dtype)
    return weights, tokens.T @ tokens / TOKENS


def row_errors(weights, moments, grid):
    change = (grid.reproduce(weights) - weights).flatten(1)
    return ((change @ moments) * change).sum(-1)


@pytest.mark.parametrize("scheme", SCHEMES)
@RELAXED
@given(st.integers(0, 2**16), st.integers(1, 3), st.sampled_from([0.0, 1.0, 10.0]))
def test_no_row_gets_worse(scheme, seed, sweeps, shared):
    weights, moments = case(seed, shared=shared)
    start = search_grid(weights, group_moments(moments, SIZE), partial(Grid.spanning, scheme=scheme))
    found = refine_grid(weights, moments, start, sweeps=sweeps)
    before, after = (row_errors(weights, moments, grid) for grid in (start, found))
    assert (after <= before * (1 + 1e-9)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_that_add_up_across_groups_are_made_up_for(scheme):
    weights, moments = case(shared=3.0)
    start = search_grid(weights, group_moments(moments, SIZE), partial(Grid.spanning, scheme=scheme))
    sums = [row_errors(weights, moments, refine_grid(weights, moments, start, sweeps=n)).sum() for n in range(3)]
    assert sums[1] < 0.8 * sums[0]
    assert sums[2] <= sums[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_last_group_is_the_best_of_all_candidates(scheme):
    weights, moments = case()
    start = nearest_grid(weights, scheme)
    found = refine_grid(weights, moments, start)
    error, last = row_errors(weights, moments, found), G - 1
    tried = 0
    for ratio in RATIOS:
        for shift in (0,) if scheme.symmetric else SHIFTS:
            scales, zeros = found.scales.clone(), found.zeros.clone()
            scales[:, last] = (start.scales[:, last] * ratio).half().double()
            zeros[:, last] = (start.zeros[:, last] + shift).clamp(0, scheme.levels)
            other = row_errors(weights, moments, Grid(scales, zeros, scheme))
            assert (error <= other * (1 + 1e-9)).all()
            tried += bool((other > error * 1.01).any())
    assert tried > 3


def test_no_sweep_changes_nothing():
    weights, moments = case()
    start = nearest_grid(weights, Scheme(4, SIZE))
    found = refine_grid(weights, moments, start, sweeps=0)
    assert torch.equal(found.scales, start.scales)
    assert torch.equal(found.zeros, start.zeros)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1.0, 1e-7], ids=["normal", "subnormal-scales"])
def test_the_grid_can_be_stored(scheme, size):
    weights, moments = case(dtype=torch.float32)
    grid = refine_grid(weights * size, moments, nearest_grid(weights * size, scheme), sweeps=2)
    assert (grid.scales > 0).all()
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.zeros, grid.zeros.round().clamp(0, scheme.levels))
    assert not scheme.symmetric or (grid.zeros == scheme.middle).all()


@pytest.mark.parametrize("dead", ["weights", "inputs"])
def test_dead_groups_cost_nothing_and_stay_finite(dead):
    weights, moments = case()
    (weights if dead == "weights" else moments).zero_()
    grid = refine_grid(weights, moments, nearest_grid(weights, Scheme(4, SIZE)))
    assert not row_errors(weights, moments, grid).any()
    assert grid.reproduce(weights).isfinite().all()
