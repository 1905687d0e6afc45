"""The test helpers fail when they should: a helper that lets everything pass is worse than none."""

import math

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, poison_empty, rng


def test_the_ratio_is_the_relative_root_mean_square():
    ref = torch.tensor([3.0, -4.0])  # rms sqrt(12.5)
    out = ref + torch.tensor([0.5, 0.5])  # error rms 0.5
    measured = 0.5 / math.sqrt(12.5)
    assert_close("x", ref, out, measured * 1.001)
    with pytest.raises(AssertionError, match=r"x: relative RMS error 0.141 is above 0.141; worst at \(0,\)"):
        assert_close("x", ref, out, measured * 0.999)


def test_the_message_names_the_worst_element():
    ref = torch.ones(3, 4)
    out = ref.clone()
    out[1, 2] = 7
    with pytest.raises(AssertionError, match=r"grad_x: .*worst at \(1, 2\): 7, expected 1 .*float32 \(3, 4\)"):
        assert_close("grad_x", ref, out.float(), 0.1)


@pytest.mark.parametrize(("wanted", "found"), [(1.0, math.nan), (1.0, math.inf), (math.inf, 1.0), (math.nan, 0.0)])
def test_numbers_that_are_not_finite_never_pass_for_others(wanted, found):
    with pytest.raises(AssertionError, match="1 elements not finite alike"):
        assert_close("x", torch.tensor([wanted, 1.0]), torch.tensor([found, 1.0]), 1e6)


@pytest.mark.parametrize("same", [math.nan, math.inf, -math.inf])
def test_the_same_infinities_pass(same):
    assert_close("x", torch.tensor([same, 2.0]), torch.tensor([same, 2.0]), 0)


def test_against_zeros_only_zeros_pass():
    assert_close("x", torch.zeros(3), torch.zeros(3), 0)
    with pytest.raises(AssertionError, match="error inf"):
        assert_close("x", torch.zeros(3), torch.full((3,), 1e-30), 0.1)


def test_shapes_must_agree_and_nothing_equals_nothing():
    with pytest.raises(AssertionError, match=r"x: shape is \(3,\), expected \(1, 3\)"):
        assert_close("x", torch.zeros(1, 3), torch.zeros(3), 1)
    assert_close("x", torch.zeros(0, 3), torch.zeros(0, 3), 0)


def test_poisoned_memory_is_nan_or_the_largest_integer_and_goes_back():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with poison_empty():
        x = torch.ones(2)
        for empty in (torch.empty(5), torch.empty_like(x), x.new_empty(3), torch.empty(2, dtype=torch.bfloat16)):
            assert empty.isnan().all()
        assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        assert (torch.empty(4, dtype=torch.uint8) == 255).all()
    assert (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory) == before


def test_every_generator_starts_at_its_seed():
    a, b, c = (torch.randn(4, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
