"""The AWQ scale search: scales never change the exact result, and are taken only where they lower the error."""

import math

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.awq.scales import ScaleChoice, fold_into_source, search_scales
from kernelgraft_core.quant.rounding import fake_quantize

K, GROUP = 64, 32


def output_error(x, weights):
    """An objective: mean squared change of the outputs for the inputs ``x``."""
    wanted = [x @ w.T for w in weights]
    return lambda changed: float(
        sum((x @ c.T - y).square().mean() for c, y in zip(changed, wanted, strict=True)) / len(weights)
    )


def search(x, weights, objective=None, **options):
    options = {"group_size": GROUP} | options
    return search_scales(weights, x.abs().mean(0), objective or output_error(x, weights), **options)


@pytest.fixture
def outlier():
    """Two layers whose input has one channel a hundred times larger than the others."""
    x = torch.randn(256, K)
    x[:, 7] *= 100
    return x, [torch.randn(48, K), torch.randn(16, K)]


@pytest.mark.parametrize("group_size", [GROUP, -1])
def test_an_outlier_channel_gets_a_scale_that_lowers_the_error(outlier, group_size):
    x, weights = outlier
    choice = search(x, weights, group_size=group_size)
    assert choice.form != "identity"
    assert choice.scales.argmax() == 7
    assert choice.error < 0.5 * choice.plain_error

    objective = output_error(x, weights)
    rounded = [fake_quantize(w * choice.scales, group_size) / choice.scales for w in weights]
    assert objective(rounded) == pytest.approx(choice.error)
    assert objective([fake_quantize(w, group_size) for w in weights]) == pytest.approx(choice.plain_error)


def test_the_choice_is_the_best_candidate_of_the_curve(outlier):
    choice = search(*outlier)
    candidates = {(form, exponent): error for form, exponent, error in choice.curve}
    assert len(candidates) == len(choice.curve)
    assert candidates["identity", 0.0] == choice.plain_error
    assert candidates[choice.form, choice.exponent] == choice.error == min(candidates.values())
    assert {form for form, _ in candidates} == {"identity", "activation", "activation/weight"}
    assert all(0 <= exponent < 1 and math.isclose(exponent * 20, round(exponent * 20)) for _, exponent in candidates)
    neighbours = {round(choice.exponent * 20) + step for step in (-1, 1)} & set(range(20))
    assert {(choice.form, point / 20) for point in neighbours} <= candidates.keys()


def test_plain_rounding_wins_ties(outlier):
    choice = search(*outlier, objective=lambda _: 1.0)
    assert (choice.form, choice.exponent, choice.error, choice.plain_error) == ("identity", 0.0, 1.0, 1.0)
    assert (choice.scales == 1).all()


def test_candidates_without_a_finite_error_are_never_taken(outlier):
    errors = iter([1.0])
    choice = search(*outlier, objective=lambda _: next(errors, math.nan))
    assert choice.form == "identity"


def test_scales_are_positive_finite_and_centred_whatever_the_channels():
    x, weight = torch.randn(32, K), torch.randn(24, K)
    x[:, :3] = 0  # dead channels
    x[:, 5] *= 1e6
    weight[:, 9] = 0  # channels that nobody reads
    weight[3] = 0
    seen = []

    def objective(weights):
        seen.extend(weights)
        return -float(len(seen))  # every candidate is better than the one before

    choice = search(x, [weight], objective=objective)
    assert choice.form != "identity"
    assert all(w.isfinite().all() for w in seen)
    assert choice.scales.isfinite().all()
    assert (choice.scales > 0).all()
    assert float(choice.scales.max() * choice.scales.min()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_coarse_grids_work(outlier, points):
    choice = search(*outlier, points=points)
    assert choice.error <= choice.plain_error
    assert all(exponent * points == round(exponent * points) for _, exponent, _ in choice.curve)


def test_no_search_means_no_scales():
    choice = ScaleChoice.identity(torch.rand(5))
    assert (choice.form, choice.scales.tolist(), choice.curve) == ("identity", [1.0] * 5, ())


SOURCES = [
    pytest.param(lambda: nn.LayerNorm(K), id="norm-with-bias"),
    pytest.param(lambda: nn.RMSNorm(K), id="norm-without-bias"),
    pytest.param(lambda: nn.Linear(20, K), id="linear-with-bias"),
    pytest.param(lambda: nn.Linear(20, K, bias=False), id="linear-without-bias"),
]


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_scales_leave_the_product_unchanged(make, dtype):
    source, target = make().to(dtype), nn.Linear(K, 12).to(dtype)
    for parameter in source.parameters():
        parameter.data.normal_()
    x = torch.randn(9, source.weight.shape[-1], dtype=dtype)
    scales = torch.logspace(-2, 2, K)
    before, inner = target(source(x)), source(x)

    target.weight.data = target.weight * scales
    fold_into_source(source, scales)

    tolerance = {torch.float32: 2e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(source(x) * scales, inner, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(target(source(x)), before, rtol=tolerance, atol=tolerance * before.abs().max().item())
    assert source.weight.dtype is dtype
