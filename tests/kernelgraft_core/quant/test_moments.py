"""Input statistics against sums over the tokens themselves."""

import pytest
import torch

from kernelgraft_core.quant.moments import InputStatistics, group_moments, relative_error, within
from kernelgraft_core.runtime.errors import NonFiniteError


def statistics_of(batches, **options):
    statistics = InputStatistics(batches[0].shape[-1], torch.device("cpu"), **options)
    for batch in batches:
        statistics.add(batch)
    return statistics


def test_statistics_of_batches_equal_those_of_all_tokens():
    batches = [torch.randn(2, 5, 12), torch.randn(1, 3, 12).bfloat16(), torch.randn(7, 12)]
    tokens = torch.cat([batch.reshape(-1, 12).double() for batch in batches])
    statistics = statistics_of(batches)

    assert statistics.tokens == 20
    torch.testing.assert_close(statistics.mean_abs.double(), tokens.abs().mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(statistics.take_moments().double(), tokens.T @ tokens / 20, rtol=1e-5, atol=1e-6)


def test_moments_are_taken_once_and_only_where_they_were_asked_for():
    statistics = statistics_of([torch.randn(3, 4)])
    statistics.take_moments()
    with pytest.raises(ValueError, match="not gathered, or have been taken"):
        statistics.take_moments()
    with pytest.raises(ValueError, match="not gathered, or have been taken"):
        statistics_of([torch.randn(3, 4)], second_moments=False).take_moments()


@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_the_moments_of_groups_are_those_of_their_channels(group_size):
    tokens = torch.randn(9, 12)
    by_group = tokens.view(9, -1, group_size)
    found = group_moments(tokens.T @ tokens, group_size)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.einsum("tgi,tgj->gij", by_group, by_group))


@pytest.mark.parametrize("rows", [1, 5, 2500])
def test_the_relative_error_is_that_of_the_outputs(rows):
    tokens, weight, change = torch.randn(30, 8).double(), torch.randn(rows, 8).double(), torch.randn(rows, 8).double()
    wanted = (tokens @ change.T).square().sum() / (tokens @ weight.T).square().sum()
    assert relative_error(change, weight, tokens.T @ tokens) == pytest.approx(float(wanted))
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0


def test_statistics_of_nothing_are_zero():
    statistics = statistics_of([torch.empty(0, 8)])
    assert not statistics.mean_abs.any()
    assert not statistics.take_moments().any()
    statistics.check("a layer")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_name_the_layer(value):
    x = torch.randn(3, 8)
    x[1, 2] = x[2, 5] = value
    with pytest.raises(NonFiniteError, match=r"activations of layers\.3\.up_proj are not finite in 2 of 8 channels"):
        statistics_of([x]).check("layers.3.up_proj")


@pytest.mark.parametrize(
    ("sizes", "limit", "lists"),
    [
        ([], 5, []),
        ([1, 2, 3], 6, [[0, 1, 2]]),
        ([1, 2, 3], 5, [[0, 1], [2]]),
        ([9, 1, 9], 5, [[0], [1], [2]]),
        ([9, 9], 0, [[0], [1]]),
    ],
)
def test_items_are_taken_in_order_up_to_the_limit(sizes, limit, lists):
    assert list(within(list(enumerate(sizes)), limit)) == lists
