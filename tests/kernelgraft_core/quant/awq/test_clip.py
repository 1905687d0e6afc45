"""The AWQ clip search: its error is that of the tokens themselves, and no group ends up worse than unclipped."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.awq import clip
from kernelgraft_core.quant.rounding import Grid, Scheme, nearest_grid

RELAXED = settings(deadline=None, max_examples=25)  # other processes take their time too

N, G, SIZE, TOKENS = 6, 3, 16, 40
W4 = Scheme(4, SIZE)
SCHEMES = [
    pytest.param(Scheme(bits, SIZE, symmetric), id=f"int{bits}-{'symmetric' if symmetric else 'asymmetric'}")
    for bits in (3, 4)
    for symmetric in (False, True)
]


def case(seed=0, dtype=torch.float32, tail=3):
    """Weights ``(N, G, g)`` with heavy tails and tokens ``(T, G, g)`` with channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(N, G, SIZE, generator=generator, dtype=dtype) ** tail
    tokens = torch.randn(TOKENS, G, SIZE, generator=generator, dtype=dtype)
    return weights, tokens * torch.rand(G, SIZE, generator=generator, dtype=dtype).exp() ** 2


def search_grid(weights, moments, scheme, **options):
    return clip.search_grid(weights, moments, partial(Grid.spanning, scheme=scheme), **options)


def moments_of(tokens):
    return torch.einsum("tgi,tgj->gij", tokens, tokens) / len(tokens)


def energies(weights, tokens):
    """Mean square of what every group contributes to the output, token by token: ``(N, G)``."""
    return torch.einsum("ngi,tgi->tng", weights, tokens).square().mean(0)


def change(grid, weights):
    return grid.reproduce(weights) - weights


@pytest.mark.parametrize("scheme", SCHEMES)
@RELAXED
@given(st.integers(0, 2**16), st.integers(1, 12), st.sampled_from([0.2, 0.5, 0.9]), st.sampled_from([1, 3, 5]))
def test_no_group_is_worse_than_unclipped(scheme, seed, steps, max_shrink, tail):
    weights, tokens = case(seed, torch.float64, tail)
    grid = search_grid(weights, moments_of(tokens), scheme, steps=steps, max_shrink=max_shrink)
    before, after = (energies(change(g, weights), tokens) for g in (nearest_grid(weights, scheme), grid))
    assert (after <= before * (1 + 1e-9)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_group_is_at_least_as_good_as_with_any_symmetric_range(scheme):
    weights, tokens = case(dtype=torch.float64)
    found = energies(change(search_grid(weights, moments_of(tokens), scheme), weights), tokens)
    reach = weights.abs().amax(-1)
    for i in range(10):
        limit = reach * (1 - 0.5 * i / 10)
        grid = Grid.spanning(weights.amin(-1).maximum(-limit), weights.amax(-1).minimum(limit), scheme)
        assert (found <= energies(change(grid, weights), tokens) * (1 + 1e-9)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_an_outlier_that_nothing_multiplies_is_cut(sign):
    weights, tokens = case(tail=1)
    weights[..., 4] = sign * 6
    tokens[..., 4] = 0
    grid, plain = search_grid(weights, moments_of(tokens), W4), nearest_grid(weights, W4)
    assert grid.scales.mean() < 0.7 * plain.scales.mean()
    assert energies(change(grid, weights), tokens).sum() < 0.5 * energies(change(plain, weights), tokens).sum()


def test_an_outlier_that_counts_is_kept():
    weights, tokens = case(tail=1)
    weights[..., 4], tokens[..., 4] = 6, 100
    kept = search_grid(weights, moments_of(tokens), W4).reproduce(weights)[..., 4]
    torch.testing.assert_close(kept, weights[..., 4], rtol=0.05, atol=0)


def test_one_step_searches_nothing():
    weights, tokens = case()
    found, plain = search_grid(weights, moments_of(tokens), W4, steps=1), nearest_grid(weights, W4)
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.zeros, plain.zeros)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_grid_can_be_stored(scheme):
    weights, tokens = case()
    grid = search_grid(weights, moments_of(tokens), scheme)
    assert grid.scheme == scheme
    assert grid.scales.shape == grid.zeros.shape == (N, G)
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.zeros, grid.zeros.round().clamp(0, scheme.levels))
    assert not scheme.symmetric or (grid.zeros == scheme.middle).all()


@pytest.mark.parametrize("dead", ["weights", "inputs"])
def test_dead_groups_cost_nothing_and_stay_finite(dead):
    weights, tokens = case()
    (weights if dead == "weights" else tokens).zero_()
    grid = search_grid(weights, moments_of(tokens), W4)
    assert energies(change(grid, weights), tokens).sum() == 0
    assert grid.reproduce(weights).isfinite().all()
