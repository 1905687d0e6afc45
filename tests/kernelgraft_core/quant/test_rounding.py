"""Round-to-nearest: every weight goes to the nearest point of a grid that float16 scales can store."""

import pytest
import torch

from kernelgraft_core.quant.rounding import LEVELS, Grid, fake_quantize, split_groups

GROUPS = [pytest.param(g, id=f"g{g}") for g in (8, 32, 96, -1)]


def spanned(groups):
    return Grid.spanning(groups.amin(-1), groups.amax(-1))


def points(grid):
    """All sixteen values of every group, float64 ``(N, G, 1, 16)``."""
    integers = torch.arange(LEVELS + 1, dtype=torch.float64)
    return ((integers - grid.zeros.double().unsqueeze(-1)) * grid.scales.double().unsqueeze(-1)).unsqueeze(-2)


@pytest.mark.parametrize("group_size", GROUPS)
def test_every_weight_becomes_the_nearest_point_of_its_grid(group_size):
    weight = torch.randn(5, 96) * torch.logspace(-3, 1, 5).unsqueeze(1)
    groups = split_groups(weight, group_size)
    grid = spanned(groups)
    nearest = (points(grid) - groups.double().unsqueeze(-1)).abs().amin(-1)

    rounded = fake_quantize(weight, group_size)

    distance = (split_groups(rounded, group_size).double() - groups.double()).abs()
    # Halfway cases may fall on either side; the distance is the same up to float32 rounding.
    torch.testing.assert_close(distance, nearest, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("group_size", GROUPS)
def test_no_weight_moves_further_than_half_a_step(group_size):
    groups = split_groups(torch.randn(7, 96), group_size)
    grid = spanned(groups)
    moved = (grid.reproduce(groups) - groups).abs() / grid.scales.unsqueeze(-1)
    # Rounding the scale to float16 adds up to 15 * 2**-11 of a step at the ends.
    assert moved.max() < 0.5 + LEVELS * 2**-11 + 1e-5


@pytest.mark.parametrize(
    ("low", "high", "zero"),
    [pytest.param(1.0, 2.0, 0, id="positive"), pytest.param(-2.0, -1.0, LEVELS, id="negative")],
)
def test_groups_of_one_sign_are_not_cut(low, high, zero):
    groups = torch.rand(4, 3, 32) * (high - low) + low
    grid = spanned(groups)
    assert (grid.zeros == zero).all()
    assert ((grid.reproduce(groups) - groups).abs() <= 0.51 * grid.scales.unsqueeze(-1)).all()


def test_zero_is_on_every_grid():
    groups = torch.randn(6, 4, 32) + torch.tensor([-5.0, 0, 0.3, 5.0]).view(4, 1)
    groups[..., 7] = 0
    grid = spanned(groups)
    assert (grid.reproduce(groups)[..., 7] == 0).all()
    assert torch.equal(grid.zeros, grid.zeros.round().clamp(0, LEVELS))


def test_integers_and_values_say_the_same():
    groups = torch.randn(3, 4, 16)
    grid = spanned(groups)
    integers = grid.round(groups)
    assert torch.equal(integers, integers.round().clamp(0, LEVELS))
    assert torch.equal((integers - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1), grid.reproduce(groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_what_float16_stores(dtype):
    grid = spanned(torch.randn(8, 4, 32, dtype=dtype))
    assert grid.scales.dtype is dtype
    assert torch.equal(grid.scales, grid.scales.half().to(dtype))


@pytest.mark.parametrize("value", [0.0, 1e-12], ids=["zeros", "below-float16"])
def test_groups_without_a_scale_that_float16_can_hold_become_zeros(value):
    assert (fake_quantize(torch.full((2, 64), value), 32) == 0).all()


def test_rounding_leaves_the_weight_alone_and_is_idempotent():
    weight = torch.randn(4, 64)
    before = weight.clone()
    once = fake_quantize(weight, 32)
    assert torch.equal(weight, before)
    torch.testing.assert_close(fake_quantize(once, 32), once, rtol=1e-3, atol=1e-6)


def test_minus_one_is_the_whole_row():
    weight = torch.randn(4, 48)
    assert split_groups(weight, -1).shape == (4, 1, 48)
    assert torch.equal(fake_quantize(weight, -1), fake_quantize(weight, 48))


@pytest.mark.parametrize("group_size", [0, -2, 7, 128])
def test_group_sizes_that_do_not_divide_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group size {group_size} does not divide K = 64"):
        fake_quantize(torch.randn(2, 64), group_size)


def test_a_weight_without_rows_stays_one():
    assert fake_quantize(torch.empty(0, 64), 32).shape == (0, 64)
