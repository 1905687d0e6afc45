"""Progressive rounding: no group leaves int8, nor a byte, whatever its range and however GPTQ pushes its weights."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.awq.clip import search_grid
from kernelgraft_core.quant.awq.refine import refine_grid
from kernelgraft_core.quant.gptq import gptq_round
from kernelgraft_core.quant.moments import group_moments
from kernelgraft_core.quant.qoq.progressive import PROTECTED, ProgressiveGrid, row_scale
from kernelgraft_core.runtime import testing

RELAXED = settings(deadline=None, max_examples=40)  # other processes take their time too
FORMS = ["pre", "post"]
N, G, SIZE = 6, 4, 16


def normal(*shape, seed=0, tail=1):
    x = torch.randn(*shape, dtype=torch.float64, generator=testing.rng(seed))
    return x.sign() * x.abs() ** tail


def every_range(reach):
    """All integer ranges ``low <= 0 <= high`` within ``reach`` as ``(N, 1)``."""
    low, high = torch.meshgrid(torch.arange(-reach, 1), torch.arange(reach + 1), indexing="ij")
    return low.flatten().double().unsqueeze(1), high.flatten().double().unsqueeze(1)


def unclamped(low, high, form, reach):
    """The rule of the paper by itself: int8 values of every weight of every range, without the clamp to int8."""
    step = ((high - low) / 15).round().clamp(min=1)
    weights = torch.arange(-reach, reach + 1).double()
    inside = (weights >= low) & (weights <= high)
    if form == "pre":
        zero = (-low / step).round().clamp(0, 15)
        q = ((weights / step).round() + zero).clamp(0, 15)
        return torch.where(inside, (q - zero) * step, 0)
    q = ((weights - low) / step).round().clamp(0, 15)
    return torch.where(inside, q * step + low, 0)


@pytest.mark.parametrize("form", FORMS)
def test_in_the_protective_range_every_weight_of_every_range_stays_in_int8(form):
    """Exhaustive: the rule needs no clamp there, and so a grid clamps nothing away."""
    low, high = every_range(PROTECTED)
    assert len(low) == 120 * 120
    plain = unclamped(low, high, form, PROTECTED)
    assert plain.min() >= -127
    assert plain.max() <= 127
    grid = ProgressiveGrid.spanning(low, high, torch.ones(len(low), 1, dtype=torch.float64), form)
    assert grid.offset.min() >= 0
    assert grid.offset.max() <= 128
    weights = torch.arange(-PROTECTED, PROTECTED + 1).double().expand(len(low), 1, -1)
    inside = (weights >= low.unsqueeze(1)) & (weights <= high.unsqueeze(1))
    q, step, offset = grid.round(weights), grid.step.unsqueeze(-1), grid.offset.unsqueeze(-1)
    free = ((weights + offset) / step).round().clamp(0, 15)
    assert torch.equal(q[inside], free[inside])
    byte = (q * step + 128 - offset)[inside]
    assert byte.min() >= 0
    assert byte.max() <= 255


def test_one_more_would_be_too_many():
    assert unclamped(*every_range(PROTECTED + 1), "pre", PROTECTED + 1).abs().max() > 127


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_rounded_no_byte_overflows(form):
    """What GPTQ hands over may lie far outside the range: the clamp is ``floor((127 + offset) / step)``."""
    low, high = every_range(PROTECTED)
    grid = ProgressiveGrid.spanning(low, high, torch.ones(len(low), 1, dtype=torch.float64), form)
    far = torch.tensor([-1e6, -500.0, -128.0, 127.0, 128.0, 500.0, 1e6]).double().expand(len(low), 1, -1)
    q, step, offset = grid.round(far), grid.step.unsqueeze(-1), grid.offset.unsqueeze(-1)
    assert q.min() == 0
    assert q.max() == 15
    assert (q * step - offset <= 127).all()
    assert (q * step - offset >= -128).all()
    # The clamp is tight: the next integer overflows, or there is none.
    assert (((q + 1) * step - offset > 127) | (q == 15))[..., -1].all()


@pytest.mark.parametrize(("step", "zero"), [(10, 2), (12, 4), (13, 5), (16, 7)])
def test_pairs_that_overflow_a_byte_when_integers_are_free_are_clamped(step, zero):
    assert 15 * step - zero * step > 127
    one = torch.ones(1, 1, dtype=torch.float64)
    grid = ProgressiveGrid(one, step * one, step * zero * one, "pre")
    top = int(grid.round(torch.full((1, 1, 1), 1e9, dtype=torch.float64)))
    assert top == zero + 127 // step


def spanning(weights, form):
    return ProgressiveGrid.spanning(weights.amin(-1), weights.amax(-1), row_scale(weights), form)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_to_the_nearest_value_of_the_grid(form):
    weights = normal(N, G, SIZE, tail=2)
    grid = spanning(weights, form)
    every = torch.arange(16).double()
    values = (every * grid.step.unsqueeze(-1) - grid.offset.unsqueeze(-1)) * grid.row.unsqueeze(-1)
    nearest = (values.unsqueeze(2) - weights.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((grid.reproduce(weights) - weights).abs(), nearest, rtol=1e-9, atol=1e-12)


def shaped(kind):
    """Weights of every kind that makes rounding hard."""
    weights = normal(N, G, SIZE, tail=3)
    rows = torch.arange(N) < N // 2
    if kind == "zero rows":
        weights[rows] = 0
    elif kind == "equal rows":
        weights[rows] = 0.37
    elif kind == "one sign":
        weights[rows] = weights[rows].abs() + 1
        weights[~rows] = -weights[~rows].abs() - 1
    elif kind == "one outlier":
        weights[rows, 0, 0] = 1e4
    elif kind == "tiny":
        weights[rows] *= 1e-7  # the row's scale is subnormal in float16
    elif kind == "vanishing":
        weights[rows] *= 1e-12  # the row's scale is zero in float16
    elif kind == "huge":
        weights[rows] *= 1e5
    return weights.float()


KINDS = ["tails", "zero rows", "equal rows", "one sign", "one outlier", "tiny", "vanishing", "huge"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest", "searched", "gptq"])
def test_packed_weights_stand_for_what_the_grid_says(form, kind, rounding):
    weights = shaped(kind)
    x = normal(64, G * SIZE, seed=3, tail=2).float()
    moments = x.T @ x / len(x)
    grid = spanning(weights, form)
    if rounding != "nearest":
        span = partial(ProgressiveGrid.spanning, row=row_scale(weights), zero=form)
        grid = search_grid(weights, group_moments(moments, SIZE), span)
        grid = refine_grid(weights, moments, grid, sweeps=2)
    if rounding == "gptq":
        integers = gptq_round(weights.flatten(1), moments, grid).view_as(weights)
    else:
        integers = grid.round(weights)
    packed = grid.pack(integers)
    assert packed.fits_bytes
    assert packed.group_size == SIZE
    assert torch.equal(packed.values(torch.float32), grid.values(integers).flatten(1))
    assert torch.equal(packed.integers().float(), integers.flatten(1))
    assert grid.values(integers).isfinite().all()
    if form == "pre":
        assert not (packed.group_zero % packed.group_scale).any()


@RELAXED
@given(st.integers(0, 2**16), st.sampled_from(FORMS), st.sampled_from([1, 3, 5]), st.sampled_from([0.0, 30.0]))
def test_however_gptq_pushes_bytes_are_exact(seed, form, tail, shared):
    """Inputs that correlate strongly push columns far out of the range that the grid was made for."""
    weights = normal(N, G, SIZE, seed=seed, tail=tail)
    x = normal(40, G * SIZE, seed=seed + 1, tail=2) + shared * normal(40, 1, seed=seed + 2)
    grid = spanning(weights, form)
    integers = gptq_round(weights.flatten(1), x.T @ x, grid, damping=1e-6).view_as(weights)
    assert grid.pack(integers).fits_bytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_grid_that_a_search_goes_on_to_can_be_stored(form, kind):
    weights = shaped(kind)
    grids = list(spanning(weights, form).nearby())
    assert len(grids) > 5
    for grid in grids:
        assert grid.step.min() >= 1
        assert grid.offset.min() >= 0
        assert grid.offset.max() <= 128
        assert torch.equal(grid.step, grid.step.round())
        assert torch.equal(grid.offset, grid.offset.round())
        assert form == "post" or not (grid.offset % grid.step).any()
        assert grid.pack(grid.round(weights)).fits_bytes


@pytest.mark.parametrize("form", FORMS)
def test_the_searches_lose_less_than_the_whole_range(form):
    weights = normal(N, G, SIZE, tail=2)
    x = normal(200, G * SIZE, seed=1) + 2 * normal(200, 1, seed=2)
    moments = x.T @ x / len(x)
    start = spanning(weights, form)
    span = partial(ProgressiveGrid.spanning, row=row_scale(weights), zero=form)
    clipped = search_grid(weights, group_moments(moments, SIZE), span)
    fitted = refine_grid(weights, moments, clipped)

    def loss(grid):
        change = (grid.reproduce(weights) - weights).flatten(1)
        return float(((change @ moments) * change).sum())

    assert loss(clipped) < loss(start)
    assert loss(fitted) < 0.8 * loss(clipped)


def test_a_zero_point_after_scaling_follows_the_range_more_closely():
    weights = normal(64, G, SIZE) + normal(64, G, 1, seed=1)
    lost = [float((spanning(weights, form).reproduce(weights) - weights).square().sum()) for form in ("post", "pre")]
    assert lost[0] < lost[1]


def test_columns_can_be_taken_apart_and_put_together():
    weights = normal(N, G, SIZE)
    grid = spanning(weights, "post")
    columns = grid.columns()
    assert [c.shape for c in columns] == [(N, 1)] * G
    again = grid.joined(columns)
    assert torch.equal(again.step, grid.step)
    assert torch.equal(again.offset, grid.offset)
    chosen = torch.rand(N, G, generator=testing.rng(1)) < 0.5
    other = spanning(2 * weights, "post")
    mixed = grid.where(chosen, other)
    assert torch.equal(mixed.step, torch.where(chosen, grid.step, other.step))
    assert torch.equal(mixed.offset, torch.where(chosen, grid.offset, other.offset))
    assert mixed.shape == grid.shape == (N, G)
