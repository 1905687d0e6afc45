"""llm-awq's interleaved layout: bytes by hand, and against the place of every single weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.llm_awq import LlmAwq, integer_zeros, pack_interleaved, unpack_interleaved
from kernelgraft_core.quant.w4a16 import W4A16Weight

from .layout_cases import hexed, random_weight

RELAXED = settings(deadline=None, max_examples=50)


def test_golden_bytes():
    """Computed by hand. Row 0 counts to 15 four columns at a time, row 1 counts them one by one, row 5 is all 5."""
    q = torch.zeros(8, 64, dtype=torch.int64)
    q[0], q[1], q[5] = torch.arange(64) // 4, torch.arange(64) % 16, 5
    weight = W4A16Weight.from_integers(q, torch.full((8, 1), 0.5), torch.arange(8).unsqueeze(1))
    tensors = LlmAwq(group_size=64).write(weight)
    first, second = tensors["qweight"]
    # A word of row 0 holds columns 8 apart. The first is 0, 8, 16, 24: values 0, 2, 4, 6.
    assert hexed(first[:16], 2) == " ".join(["2064"] * 4 + ["3175"] * 4 + ["a8ec"] * 4 + ["b9fd"] * 4)
    # Row 1: the words go 0, 1, 2, ... along the columns, then 32, 33, ...
    assert hexed(first[16:32], 2) == " ".join(["8080 9191 a2a2 b3b3 c4c4 d5d5 e6e6 f7f7"] * 2)
    assert hexed(first[32:], 2) == " ".join(["0000"] * 32)
    assert hexed(second, 2) == " ".join(["0000"] * 16 + ["5555"] * 16 + ["0000"] * 32)
    assert hexed(tensors["scales"][0], 2) == " ".join(["0038"] * 8)
    # -(0.5 * z) for z = 0 .. 7: minus zero first.
    assert hexed(tensors["scaled_zeros"][0], 2) == "0080 00b8 00bc 00be 00c0 00c1 00c2 00c3"
    assert tensors["scales"].shape == tensors["scaled_zeros"].shape == (16, 8)
    assert not tensors["scales"][1:].any()
    assert not tensors["scaled_zeros"][1:].any()


PLACES = st.tuples(st.integers(0, 11), st.integers(0, 191), st.integers(1, 15))


@RELAXED
@given(PLACES)
def test_every_weight_has_the_place_that_the_definition_says(place):
    row, column, value = place
    q = torch.zeros(12, 192, dtype=torch.int32)
    q[row, column] = value
    words = pack_interleaved(q)
    b, within = divmod(column, 64)
    c, within = divmod(within, 32)
    i, within = divmod(within, 8)
    j, h = divmod(within, 2)
    word = 64 * b + 16 * (row % 4) + 8 * c + 2 * j + h
    assert words.nonzero().tolist() == [[row // 4, word]]
    assert int(words[row // 4, word]) & 0xFFFF == value << (4 * i)
    assert torch.equal(unpack_interleaved(words), q.to(torch.uint8))


@RELAXED
@given(st.integers(0, 2**32 - 1))
def test_any_words_survive_the_round_trip(seed):
    words = torch.randint(-(2**15), 2**15, (3, 128), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    assert torch.equal(pack_interleaved(unpack_interleaved(words)), words)


FLOAT16_SCALES = st.integers(1, 0x77FF)  # every positive number of which 15 times is finite, subnormals included


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@RELAXED
@given(st.lists(FLOAT16_SCALES, min_size=1, max_size=8))
def test_zero_points_come_back_exactly(dtype, patterns):
    scales = torch.tensor(patterns, dtype=torch.int16).view(torch.float16).clamp(max=4000).to(dtype).unsqueeze(1)
    zeros = torch.arange(16)
    stored = (-(scales.float() * zeros)).to(dtype)
    assert torch.equal(integer_zeros(scales.expand(-1, 16), stored), zeros.to(torch.uint8).expand(len(patterns), -1))


def test_an_offset_from_a_scale_that_was_not_rounded_yet_is_understood():
    exact = torch.linspace(0.001, 0.1, 997)
    zeros = torch.arange(997) % 16
    assert torch.equal(integer_zeros(exact.half(), -(exact * zeros).half()), zeros.to(torch.uint8))


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(0.5, -3.75), (0.5, 0.5), (0.5, -8.0), (0.0, -1.0), (0.5, float("nan")), (float("nan"), -1.0),
     (0.5, float("-inf")), (0.01, -0.0745)],
    ids=["between", "negative", "16", "no-scale", "nan", "nan-scale", "inf", "7.45"],
)  # fmt: skip
def test_an_offset_that_is_no_integer_zero_point_is_refused_with_its_value(scale, offset):
    layout = LlmAwq(group_size=64)
    tensors = layout.write(random_weight(layout, 8, 128, 0))
    tensors["scales"][1, 3], tensors["scaled_zeros"][1, 3] = scale, offset
    with pytest.raises(ValueError, match=r"scaled_zeros\[1, 3\] = .* is not minus the scale, .*, times an integer"):
        layout.read(tensors)


def test_a_group_of_zeros_may_have_scale_zero():
    assert integer_zeros(torch.zeros(2).half(), torch.tensor([0.0, -0.0]).half()).tolist() == [0, 0]


def test_bfloat16_checkpoints_are_read():
    layout = LlmAwq(group_size=64)
    weight = random_weight(layout, 8, 128, 0)
    scales = weight.scales.bfloat16().half()  # what bfloat16 holds of them
    rounded = W4A16Weight(weight.qweight, scales, weight.zeros)
    tensors = layout.write(rounded)
    halves = {part: t if part == "qweight" else t.bfloat16() for part, t in tensors.items()}
    assert all(torch.equal(a, b) for a, b in zip(layout.read(halves).tensors, rounded.tensors, strict=True))
