"""Round-to-nearest: every weight goes to the nearest point of a grid that float16 scales can store."""

import pytest
import torch

from kernelgraft_core.quant.rounding import Grid, Scheme, fake_quantize, nearest_grid, split_groups

SCHEMES = [
    pytest.param(Scheme(bits, size, symmetric), id=f"int{bits}-g{size}-{'symmetric' if symmetric else 'asymmetric'}")
    for bits in (3, 4)
    for size in (8, 32, 96, -1)
    for symmetric in (False, True)
]
KINDS = [
    pytest.param(Scheme(bits, 32, symmetric), id=f"int{bits}-{'symmetric' if symmetric else 'asymmetric'}")
    for bits in (3, 4)
    for symmetric in (False, True)
]
W4 = Scheme(4, 32)


def points(grid):
    """All values of every group, float64 ``(N, G, 1, levels + 1)``."""
    integers = torch.arange(grid.scheme.levels + 1, dtype=torch.float64)
    return ((integers - grid.zeros.double().unsqueeze(-1)) * grid.scales.double().unsqueeze(-1)).unsqueeze(-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_becomes_the_nearest_point_of_its_grid(scheme):
    weight = torch.randn(5, 96) * torch.logspace(-3, 1, 5).unsqueeze(1)
    groups = split_groups(weight, scheme.group_size)
    grid = nearest_grid(groups, scheme)
    nearest = (points(grid) - groups.double().unsqueeze(-1)).abs().amin(-1)

    rounded = fake_quantize(weight, scheme)

    distance = (split_groups(rounded, scheme.group_size).double() - groups.double()).abs()
    # Halfway cases may fall on either side; the distance is the same up to float32 rounding.
    torch.testing.assert_close(distance, nearest, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_weight_moves_further_than_half_a_step(scheme):
    groups = split_groups(torch.randn(7, 96), scheme.group_size)
    grid = nearest_grid(groups, scheme)
    moved = (grid.reproduce(groups) - groups).abs() / grid.scales.unsqueeze(-1)
    # Rounding the scale to float16 adds up to levels * 2**-11 of a step at the ends.
    assert moved.max() < 0.5 + scheme.levels * 2**-11 + 1e-5


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize(
    ("low", "high"), [pytest.param(1.0, 2.0, id="positive"), pytest.param(-2.0, -1.0, id="negative")]
)
def test_groups_of_one_sign_are_not_cut(low, high, scheme):
    groups = torch.rand(4, 3, 32) * (high - low) + low
    grid = nearest_grid(groups, scheme)
    assert (grid.zeros == (scheme.middle if scheme.symmetric else 0 if low > 0 else scheme.levels)).all()
    assert ((grid.reproduce(groups) - groups).abs() <= 0.51 * grid.scales.unsqueeze(-1)).all()


@pytest.mark.parametrize("scheme", KINDS)
def test_zero_is_on_every_grid(scheme):
    groups = torch.randn(6, 4, 32) + torch.tensor([-5.0, 0, 0.3, 5.0]).view(4, 1)
    groups[..., 7] = 0
    grid = nearest_grid(groups, scheme)
    assert (grid.reproduce(groups)[..., 7] == 0).all()
    assert torch.equal(grid.zeros, grid.zeros.round().clamp(0, scheme.levels))


@pytest.mark.parametrize("scheme", KINDS)
def test_integers_and_values_say_the_same(scheme):
    groups = torch.randn(3, 4, 32)
    grid = nearest_grid(groups, scheme)
    integers = grid.round(groups)
    assert torch.equal(integers, integers.round().clamp(0, scheme.levels))
    assert torch.equal((integers - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1), grid.reproduce(groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_what_float16_stores(dtype):
    grid = nearest_grid(torch.randn(8, 4, 32, dtype=dtype), W4)
    assert grid.scales.dtype is dtype
    assert torch.equal(grid.scales, grid.scales.half().to(dtype))


@pytest.mark.parametrize("value", [0.0, 1e-12], ids=["zeros", "below-float16"])
@pytest.mark.parametrize("scheme", KINDS)
def test_groups_without_a_scale_that_float16_can_hold_become_zeros(value, scheme):
    assert (fake_quantize(torch.full((2, 64), value), scheme) == 0).all()


@pytest.mark.parametrize("scheme", KINDS)
def test_rounding_leaves_the_weight_alone_and_is_idempotent(scheme):
    weight = torch.randn(4, 64)
    before = weight.clone()
    once = fake_quantize(weight, scheme)
    assert torch.equal(weight, before)
    torch.testing.assert_close(fake_quantize(once, scheme), once, rtol=1e-3, atol=1e-6)


def test_minus_one_is_the_whole_row():
    weight = torch.randn(4, 48)
    assert split_groups(weight, -1).shape == (4, 1, 48)
    assert torch.equal(fake_quantize(weight, Scheme(4, -1)), fake_quantize(weight, Scheme(4, 48)))


@pytest.mark.parametrize("group_size", [7, 128])
def test_group_sizes_that_do_not_divide_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group size {group_size} does not divide K = 64"):
        fake_quantize(torch.randn(2, 64), Scheme(4, group_size))


@pytest.mark.parametrize("group_size", [0, -2])
def test_group_sizes_that_divide_nothing_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group size {group_size} is neither positive nor -1"):
        Scheme(4, group_size)


@pytest.mark.parametrize("bits", [0, 2, 5, 8])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits} bits per weight; 3 and 4 are supported"):
        Scheme(bits)


@pytest.mark.parametrize("low", [-2.0, -0.5])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_symmetric_grid_reaches_both_ends_and_no_further_than_it_must(bits, low):
    scheme = Scheme(bits, 32, symmetric=True)
    grid = Grid.spanning(torch.full((1, 1), low), torch.ones(1, 1), scheme)
    down, up = points(grid)[0, 0, 0, [0, -1]]
    assert down <= low * (1 - 1e-3)
    assert up >= 1 - 1e-3
    assert down == pytest.approx(low, rel=1e-3) or up == pytest.approx(1, rel=1e-3)


def test_groups_are_taken_from_either_grid():
    one, other = (nearest_grid(torch.randn(3, 2, 32), W4) for _ in range(2))
    chosen = torch.tensor([[True, False], [False, False], [True, True]])
    mixed = one.where(chosen, other)
    assert mixed.scheme == W4
    for part in ("scales", "zeros"):
        assert torch.equal(getattr(mixed, part)[chosen], getattr(one, part)[chosen])
        assert torch.equal(getattr(mixed, part)[~chosen], getattr(other, part)[~chosen])


def test_a_weight_without_rows_stays_one():
    assert fake_quantize(torch.empty(0, 64), W4).shape == (0, 64)
