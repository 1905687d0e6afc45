"""int4 packing: a bijection between eight values and a word, in the order that 16-bit lanes unpack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.int4 import pack_int4, unpack_int4

RELAXED = settings(deadline=None, max_examples=50)  # other processes take their time too

WORD = st.integers(-(2**31), 2**31 - 1)
EIGHT = st.lists(st.integers(0, 15), min_size=8, max_size=8)

# Nibble 0 is the lowest digit of a word: it holds element 0, then 2, 4, 6, 1, 3, 5, 7.
GOLDEN = [
    pytest.param([0, 1, 2, 3, 4, 5, 6, 7], 0x75316420, id="counting"),
    pytest.param([0, 4, 1, 5, 2, 6, 3, 7], 0x76543210, id="counting-nibbles"),
    pytest.param([15, 0, 0, 0, 0, 0, 0, 0], 0x0000000F, id="element-0"),
    pytest.param([0, 15, 0, 0, 0, 0, 0, 0], 0x000F0000, id="element-1"),
    pytest.param([0, 0, 15, 0, 0, 0, 0, 0], 0x000000F0, id="element-2"),
    pytest.param([0, 0, 0, 0, 0, 0, 0, 7], 0x70000000, id="element-7"),
    pytest.param([0, 0, 0, 0, 0, 0, 0, 8], -0x80000000, id="sign-bit"),
    pytest.param([15] * 8, -1, id="all-ones"),
]


@pytest.mark.parametrize(("values", "word"), GOLDEN)
def test_words_computed_by_hand(values, word):
    packed = pack_int4(torch.tensor(values))
    assert packed.dtype is torch.int32
    assert packed.tolist() == [word]
    assert unpack_int4(torch.tensor([word], dtype=torch.int32)).tolist() == values


@RELAXED
@given(st.lists(EIGHT, min_size=1, max_size=4))
def test_unpacking_undoes_packing(rows):
    values = torch.tensor(rows).view(1, len(rows), 8)
    unpacked = unpack_int4(pack_int4(values))
    assert unpacked.dtype is torch.uint8
    assert torch.equal(unpacked.long(), values)


@RELAXED
@given(st.lists(WORD, min_size=1, max_size=4))
def test_every_word_stands_for_other_values(words):
    packed = torch.tensor(words, dtype=torch.int32)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


@RELAXED
@given(EIGHT, st.integers(0, 3))
def test_a_shift_and_a_mask_leave_two_neighbours_in_the_halves_of_a_word(values, i):
    word = pack_int4(torch.tensor(values)).item()
    lanes = (word >> 4 * i) & 0x000F000F
    assert (lanes & 0xFFFF, lanes >> 16) == (values[2 * i], values[2 * i + 1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_and_any_strides_pack_alike(dtype):
    values = torch.randint(0, 16, (16, 3))
    assert torch.equal(pack_int4(values.to(dtype).T), pack_int4(values.T.contiguous()))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_nothing_packs_to_nothing(shape):
    words = pack_int4(torch.zeros(shape, dtype=torch.uint8))
    assert words.shape == (*shape[:-1], shape[-1] // 8)
    assert unpack_int4(words).shape == shape


def test_what_does_not_fit_is_refused_with_its_value():
    with pytest.raises(ValueError, match="cannot pack 12 values: not a multiple of 8"):
        pack_int4(torch.zeros(2, 12, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"values span 0\.\.16, expected 0\.\.15"):
        pack_int4(torch.tensor([16, 0, 0, 0, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"values span -1\.\.3, expected 0\.\.15"):
        pack_int4(torch.tensor([-1, 3, 0, 0, 0, 0, 0, 0], dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_words_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f"packed words are {dtype}, expected torch.int32"):
        unpack_int4(torch.zeros(2, 2, dtype=dtype))
