"""Our own layout: bytes by hand, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.weights import pack_weight

from .layout_cases import hexed, random_weight, same_bits

RELAXED = settings(deadline=None, max_examples=50)


def test_golden_bytes_of_four_bits():
    """Computed by hand: nibbles hold elements 0, 2, 4, 6, 1, 3, 5, 7."""
    weight = pack_weight(torch.arange(16)[None], torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 12]]), 4)
    tensors = Native(4, 8).write(weight)
    assert list(tensors) == ["qweight", "scales", "zeros"]
    assert hexed(tensors["qweight"]) == "20643175 a8ecb9fd"
    assert hexed(tensors["scales"], 2) == "0038 0040"
    assert hexed(tensors["zeros"], 1) == "03 0c"


def test_golden_bytes_of_three_bits():
    """Computed by hand: 0 to 7 four times over. Even elements are in the lower half of a word, odd ones in the upper.

    Low bits of even elements go 0, 2, 0, 2, of odd ones 1, 3, 1, 3; top bits of both go 0, 0, 1, 1.
    """
    weight = pack_weight(torch.arange(32)[None] % 8, torch.tensor([[0.5]]), torch.tensor([[4]]), 3)
    tensors = Native(3, 32, symmetric=True).write(weight)
    assert list(tensors) == ["qweight", "qhigh", "scales"]
    assert hexed(tensors["qweight"]) == "8888dddd 8888dddd"
    assert hexed(tensors["qhigh"]) == "cccccccc"


@pytest.mark.parametrize("bits", [3, 4])
@RELAXED
@given(st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from([32, 64, 96])), st.integers(0, 2**32 - 1))
def test_any_checkpoint_survives_the_round_trip_bit_for_bit(bits, shape, seed):
    n, groups, size = shape
    layout, generator = Native(bits, size), torch.Generator().manual_seed(seed)
    tensors = {}
    for part, wanted in layout.parts(n, groups * size).items():
        made = wanted.written
        if part == "zeros":
            tensors[part] = torch.randint(0, 1 << bits, made.shape, generator=generator, dtype=made.dtype)
        else:
            words = torch.randint(-(2**31), 2**31, made.shape, generator=generator, dtype=torch.int64).to(torch.int32)
            tensors[part] = words.to(torch.int16).view(torch.float16) if part == "scales" else words
    rewritten = layout.write(layout.read(tensors))
    assert rewritten.keys() == tensors.keys()
    assert all(same_bits(rewritten[part], tensors[part]) for part in tensors)


@pytest.mark.parametrize("bits", [3, 4])
def test_zero_points_that_do_not_fit_are_refused(bits):
    layout = Native(bits, 64)
    tensors = layout.write(random_weight(layout, 8, 128, 0))
    tensors["zeros"][5, 1] = 1 << bits
    with pytest.raises(ValueError, match=rf"zeros go up to {1 << bits}, expected 0\.\.{(1 << bits) - 1}"):
        layout.read(tensors)
