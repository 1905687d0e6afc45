"""The AWQ scale search: scales never change the exact result, and are taken only where they lower the error."""

import math

import pytest
import torch

from kernelgraft_core.quant.awq.scales import ScaleChoice, search_scales
from kernelgraft_core.quant.rounding import Scheme, fake_quantize

K = 64
W4 = Scheme(4, 32)


def output_error(x, weights):
    """An objective: mean squared change of the outputs for the inputs ``x``."""
    wanted = [x @ w.T for w in weights]
    return lambda changed: float(
        sum((x @ c.T - y).square().mean() for c, y in zip(changed, wanted, strict=True)) / len(weights)
    )


def search(x, weights, objective=None, **options):
    options = {"scheme": W4} | options
    return search_scales(weights, x.abs().mean(0), objective or output_error(x, weights), **options)


@pytest.fixture
def outlier():
    """Two layers whose input has one channel a hundred times larger than the others."""
    x = torch.randn(256, K)
    x[:, 7] *= 100
    return x, [torch.randn(48, K), torch.randn(16, K)]


@pytest.mark.parametrize(
    "scheme", [W4, Scheme(4, -1), Scheme(4, 32, symmetric=True), Scheme(3, 32)], ids=["W4", "row", "symmetric", "W3"]
)
def test_an_outlier_channel_gets_a_scale_that_lowers_the_error(outlier, scheme):
    x, weights = outlier
    choice = search(x, weights, scheme=scheme)
    assert choice.form != "identity"
    assert choice.scales.argmax() == 7
    assert choice.error < 0.5 * choice.plain_error

    objective = output_error(x, weights)
    rounded = [fake_quantize(w * choice.scales, scheme) / choice.scales for w in weights]
    assert objective(rounded) == pytest.approx(choice.error)
    assert objective([fake_quantize(w, scheme) for w in weights]) == pytest.approx(choice.plain_error)


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
