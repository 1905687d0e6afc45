"""GPTQ's rounding against the textbook recursion, exhaustive search and the bound of Babai's nearest plane."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.gptq import gptq_round, round_columns
from kernelgraft_core.quant.rounding import Grid, Scheme, nearest_grid, split_groups
from kernelgraft_core.runtime.errors import NonFiniteError

RELAXED = settings(deadline=None, max_examples=25)  # other processes take their time too
SCHEMES = [
    pytest.param(Scheme(bits, size, symmetric), id=f"int{bits}-g{size}-{'symmetric' if symmetric else 'asymmetric'}")
    for bits in (3, 4)
    for size in (8, -1)
    for symmetric in (False, True)
]
ORDERS = ["activation", "natural"]


def problem(n=5, k=24, seed=0, tokens=60, dtype=torch.float64):
    """A weight ``(N, K)`` and the second moments of correlated inputs with channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=dtype) + 2
    x = torch.randn(tokens, k, generator=generator, dtype=dtype) @ mix
    x = x * torch.rand(k, generator=generator, dtype=dtype).exp() ** 2
    return torch.randn(n, k, generator=generator, dtype=dtype), x.T @ x / tokens


def values(integers, grid):
    groups = integers.view(*grid.scales.shape, -1)
    return ((groups - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1)).view_as(integers)


def loss(weight, rounded, hessian):
    change = rounded - weight
    return ((change @ hessian) * change).sum(-1)


def nearest(weight, scheme):
    grid = nearest_grid(split_groups(weight, scheme.group_size), scheme)
    return grid.round(split_groups(weight, scheme.group_size)).flatten(1), grid


def gptq(weight, hessian, scheme, **options):
    """Integers, and the grids over the whole range of every group that they are on."""
    grid = nearest(weight, scheme)[1]
    return gptq_round(weight, hessian, grid, **options), grid


def textbook(weight, hessian, grid, damping, order):
    """Algorithm 1 of the paper without its blocks and without Cholesky: the inverse shrinks by one row at a time."""
    k = weight.shape[1]
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(k, dtype=hessian.dtype))
    size = k // grid.scales.shape[1]
    columns = range(k) if order == "natural" else hessian.diagonal().argsort(descending=True).tolist()
    weight, integers = weight.clone(), torch.empty_like(weight)
    for i in columns:
        scale, zero = grid.scales[:, i // size], grid.zeros[:, i // size]
        integers[:, i] = ((weight[:, i] / scale).round() + zero).clamp(0, grid.scheme.levels)
        error = weight[:, i] - (integers[:, i] - zero) * scale
        weight -= torch.outer(error, inverse[i]) / inverse[i, i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return integers


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", [1, 7, 128])
def test_it_is_the_recursion_of_the_paper_whatever_the_block(scheme, order, block):
    weight, hessian = problem()
    integers, grid = gptq(weight, hessian, scheme, block=block, order=order)
    assert torch.equal(integers, textbook(weight, hessian, grid, 0.01, order))
    assert torch.equal(grid.scales, nearest(weight, scheme)[1].scales)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_loses_less_than_rounding_to_nearest(scheme, order):
    lost = {"gptq": 0.0, "nearest": 0.0}
    for seed in range(8):
        weight, hessian = problem(seed=seed)
        integers, grid = gptq(weight, hessian, scheme, order=order)
        lost["gptq"] += float(loss(weight, values(integers, grid), hessian).sum() / hessian.trace())
        lost["nearest"] += float(loss(weight, values(*nearest(weight, scheme)), hessian).sum() / hessian.trace())
    assert lost["gptq"] < 0.5 * lost["nearest"]


@pytest.mark.parametrize("order", ORDERS)
def test_it_comes_close_to_the_best_of_all_roundings(order):
    """Of inputs that correlate but leave every column some freedom: with less, the ends of the grid decide."""
    scheme, found, best, plain = Scheme(3, -1), 0.0, 0.0, 0.0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, 5, generator=generator, dtype=torch.float64)
        causes = torch.randn(200, 1, generator=generator, dtype=torch.float64)
        x = causes + 0.5 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
        hessian = x.T @ x / 200
        integers, grid = gptq(weight, hessian, scheme, order=order)
        every = torch.tensor(list(itertools.product(range(8), repeat=5)), dtype=torch.float64)
        lowest = float(loss(weight, (every - grid.zeros) * grid.scales, hessian).min())
        mine = float(loss(weight, values(integers, grid), hessian)[0])
        assert mine >= lowest * (1 - 1e-9)
        found, best = found + mine, best + lowest
        plain += float(loss(weight, values(*nearest(weight, scheme)), hessian)[0])
    assert found < best + 0.5 * (plain - best)


@RELAXED
@given(st.integers(0, 2**16), st.integers(1, 20), st.sampled_from(ORDERS))
def test_without_ends_to_the_grid_it_keeps_the_bound_of_the_nearest_plane(seed, k, order):
    """No column ends further than half a step from where the ones before it have moved it to."""
    weight, hessian = problem(n=3, k=k, seed=seed)
    step = 0.25
    # The damped Hessian is what is minimized: damping 1e-9 of the mean is next to nothing.
    integers = round_columns(
        weight, hessian, lambda w, _: ((w / step).round(), (w / step).round() * step), group_size=-1, damping=1e-9,
        order=order,
    )  # fmt: skip
    columns = hessian.diagonal().argsort(descending=True, stable=True) if order == "activation" else torch.arange(k)
    turned = hessian[columns][:, columns]
    # Squared lengths of the inputs that are left of each column when those before it are known to be free.
    pivots = torch.linalg.cholesky(torch.linalg.inv(turned), upper=True).diagonal() ** -2
    assert (loss(weight, integers * step, hessian) <= pivots.sum() * (step / 2) ** 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_that_are_independent_leave_rounding_to_nearest(scheme, order):
    weight, hessian = problem()
    integers, _ = gptq(weight, hessian.diagonal().diag(), scheme, order=order)
    assert torch.equal(integers, nearest(weight, scheme)[0])


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_scale_of_the_hessian_does_not_matter(factor):
    weight, hessian = problem()
    assert torch.equal(gptq(weight, hessian * factor, Scheme(4, 8))[0], gptq(weight, hessian, Scheme(4, 8))[0])


def test_columns_that_are_never_used_are_rounded_as_they_are_and_change_nothing():
    scheme, dead = Scheme(4, 8), [0, 5, 16, 17, 18, 19, 20, 21, 22, 23]
    weight, hessian = problem()
    hessian[dead] = 0
    hessian[:, dead] = 0
    integers, grid = gptq(weight, hessian, scheme)
    assert torch.equal(integers[:, dead], nearest(weight, scheme)[0][:, dead])

    live = [i for i in range(24) if i not in dead]
    alone = round_columns(
        weight[:, live],
        hessian[live][:, live],
        lambda column, i: (column, _on_grid(column, grid, live[i] // 8)),
        group_size=1,
    )
    rounded = torch.stack([_on_grid(alone[:, i], grid, c // 8) for i, c in enumerate(live)], -1)
    assert torch.equal(values(integers, grid)[:, live], rounded)


def _on_grid(column, grid, group):
    scale, zero = grid.scales[:, group], grid.zeros[:, group]
    return (((column / scale).round() + zero).clamp(0, grid.scheme.levels) - zero) * scale


def test_without_any_input_it_rounds_to_nearest():
    weight, hessian = problem()
    integers, _ = gptq(weight, torch.zeros_like(hessian), Scheme(4, 8))
    assert torch.equal(integers, nearest(weight, Scheme(4, 8))[0])


def test_a_given_grid_is_kept():
    weight, hessian = problem()
    wide = Grid.spanning(torch.full((5, 3), -4.0).double(), torch.full((5, 3), 4.0).double(), Scheme(4, 8))
    integers = gptq_round(weight, hessian, wide)
    assert torch.equal(integers, textbook(weight, hessian, wide, 0.01, "activation"))


def test_a_column_hears_of_its_own_group_whatever_the_order():
    weight, hessian = problem()
    seen = {}

    def remember(column, group):
        seen.setdefault(group, []).append(column)
        return column, column  # nothing is lost, so columns arrive as they were

    assert torch.equal(round_columns(weight, hessian, remember, group_size=8), weight)
    for group, columns in seen.items():
        assert sorted(c[0].item() for c in columns) == sorted(weight[0, 8 * group : 8 * group + 8].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integers_come_in_the_dtype_of_the_weight_and_can_be_stored(dtype):
    weight, hessian = problem(dtype=dtype)
    before = weight.clone(), hessian.clone()
    integers, grid = gptq(weight, hessian, Scheme(3, 8))
    assert integers.dtype is grid.scales.dtype is dtype
    assert integers.is_contiguous()
    assert torch.equal(integers, integers.round().clamp(0, 7))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_fewer_tokens_than_columns_are_enough():
    weight, hessian = problem(tokens=5)
    integers, grid = gptq(weight, hessian, Scheme(4, 8))
    plain = loss(weight, values(*nearest(weight, Scheme(4, 8))), hessian).sum()
    assert loss(weight, values(integers, grid), hessian).sum() < 0.2 * plain


def test_damping_is_raised_until_the_hessian_can_be_factored(caplog):
    weight, hessian = problem(tokens=5)
    hessian -= 0.003 * hessian.diagonal().mean() * torch.eye(24)  # rounding errors of long sums, exaggerated
    integers, _ = gptq(weight, hessian, Scheme(4, 8), damping=1e-4)
    assert "a Hessian of 24 columns needed damping 0.01 instead of 0.0001" in caplog.text
    assert torch.equal(integers, gptq(weight, hessian, Scheme(4, 8), damping=0.01)[0])


def test_a_hessian_that_no_damping_makes_definite_is_refused():
    weight, hessian = problem()
    with pytest.raises(NonFiniteError, match="the Hessian of 24 columns is not positive definite with damping 1"):
        gptq(weight, hessian - 100 * hessian.diagonal().mean() * (1 - torch.eye(24)), Scheme(4, 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["weight", "Hessian"])
def test_nan_is_refused(which, value):
    weight, hessian = problem()
    (weight if which == "weight" else hessian)[2, 3] = value
    with pytest.raises(NonFiniteError, match=f"the {which} is not finite in 1 of"):
        gptq_round(weight, hessian, nearest(problem()[0], Scheme(4, 8))[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block of 0 columns"),
        ({"damping": -0.1}, "damping -0.1"),
        ({"damping": float("nan")}, "damping nan"),
        ({"order": "random"}, "order 'random'; there are activation, natural"),
        ({"grid": nearest(torch.ones(5, 35), Scheme(4, 7))[1]}, r"\(5, 24\), but the grid is for \(5, 5\) groups"),
        ({"hessian": torch.eye(23)}, r"weight is \(5, 24\), the Hessian \(23, 23\)"),
        (
            {"grid": nearest(torch.ones(4, 24), Scheme(4, 8))[1]},
            r"weight is \(5, 24\), but the grid is for \(4, 3\) groups",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weight, hessian = problem()
    with pytest.raises(ValueError, match=message):
        gptq_round(**{"weight": weight, "hessian": hessian, "grid": nearest(weight, Scheme(4, 8))[1]} | change)


def test_a_weight_without_rows_stays_one():
    assert gptq(torch.empty(0, 16), torch.eye(16), Scheme(4, 8))[0].shape == (0, 16)
