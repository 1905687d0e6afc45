"""int3 packing: a bijection between 32 values and three words, each plane in the order that 16-bit lanes unpack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.int3 import pack_int3, unpack_int3

RELAXED = settings(deadline=None, max_examples=50)  # other processes take their time too

WORD = st.integers(-(2**31), 2**31 - 1)
VALUES = st.lists(st.integers(0, 7), min_size=32, max_size=32)


def only(**values):
    """32 zeros but for the elements given as ``e5=7``."""
    return [values.get(f"e{index}", 0) for index in range(32)]


def signed(word):
    return word - (1 << 32) if word >= 1 << 31 else word


# Low words: element 2 f + h of sixteen begins at bit 2 f + 16 h. High word: element 2 f + h of 32 is bit f + 16 h.
GOLDEN = [
    pytest.param(only(), 0, 0, 0, id="zeros"),
    pytest.param([7] * 32, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, id="all-ones"),
    pytest.param([3] * 32, 0xFFFFFFFF, 0xFFFFFFFF, 0, id="low-bits"),
    pytest.param([4] * 32, 0, 0, 0xFFFFFFFF, id="top-bits"),
    pytest.param(only(e0=7), 0x00000003, 0, 0x00000001, id="element-0"),
    pytest.param(only(e1=7), 0x00030000, 0, 0x00010000, id="element-1"),
    pytest.param(only(e2=7), 0x0000000C, 0, 0x00000002, id="element-2"),
    pytest.param(only(e15=6), 0x80000000, 0, 0x00800000, id="element-15"),
    pytest.param(only(e16=5), 0, 0x00000001, 0x00000100, id="element-16"),
    pytest.param(only(e31=7), 0, 0xC0000000, 0x80000000, id="element-31"),
    # Low bits 0 2 0 2 ... in the lower half, 1 3 1 3 ... in the upper; top bits of every third and fourth pair.
    pytest.param([0, 1, 2, 3, 4, 5, 6, 7] * 4, 0xDDDD8888, 0xDDDD8888, 0xCCCCCCCC, id="counting"),
]


@pytest.mark.parametrize(("values", "first", "second", "top"), GOLDEN)
def test_words_computed_by_hand(values, first, second, top):
    low, high = pack_int3(torch.tensor(values))
    assert (low.dtype, high.dtype) == (torch.int32, torch.int32)
    assert low.tolist() == [signed(first), signed(second)]
    assert high.tolist() == [signed(top)]
    assert unpack_int3(low, high).tolist() == values


@RELAXED
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_unpacking_undoes_packing(rows):
    values = torch.tensor(rows).view(1, len(rows), 32)
    unpacked = unpack_int3(*pack_int3(values))
    assert unpacked.dtype is torch.uint8
    assert torch.equal(unpacked.long(), values)


@RELAXED
@given(st.lists(st.tuples(WORD, WORD, WORD), min_size=1, max_size=4))
def test_every_pair_of_planes_stands_for_other_values(words):
    planes = torch.tensor(words, dtype=torch.int32)
    low, high = planes[:, :2], planes[:, 2:]
    again = pack_int3(unpack_int3(low, high))
    assert torch.equal(again[0], low)
    assert torch.equal(again[1], high)


@RELAXED
@given(VALUES, st.integers(0, 1), st.integers(0, 7))
def test_shifts_and_masks_leave_two_neighbours_in_the_halves_of_a_word(values, c, f):
    low, high = pack_int3(torch.tensor(values))
    pairs = (low[c].item() >> 2 * f) & 0x00030003 | ((high[0].item() >> (8 * c + f)) & 0x00010001) << 2
    assert (pairs & 0xFFFF, pairs >> 16) == (values[16 * c + 2 * f], values[16 * c + 2 * f + 1])


@RELAXED
@given(VALUES, st.integers(0, 1), st.integers(0, 7))
def test_a_rotation_and_a_selection_put_the_planes_together(values, c, f):
    """What the GPU kernels do in assembly: the top bits are rotated to bit 2 of the halves and selected there."""
    low, high = (plane.long() & 0xFFFFFFFF for plane in pack_int3(torch.tensor(values)))
    by = (8 * c + f - 2) % 32
    rotated = (high[0].item() >> by | high[0].item() << (32 - by)) & 0xFFFFFFFF
    pairs = (rotated & 0x00040004 | low[c].item() >> 2 * f & ~0x00040004) & 0x00070007
    assert (pairs & 0xFFFF, pairs >> 16) == (values[16 * c + 2 * f], values[16 * c + 2 * f + 1])


@RELAXED
@given(st.lists(VALUES, min_size=2, max_size=4), st.data())
def test_planes_can_be_cut_in_units_of_32(rows, data):
    values = torch.tensor(rows).flatten()
    begin = data.draw(st.integers(0, len(rows) - 1))
    end = data.draw(st.integers(begin, len(rows)))
    low, high = pack_int3(values)
    part = unpack_int3(low[2 * begin : 2 * end], high[begin:end])
    assert torch.equal(part.long(), values[32 * begin : 32 * end])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_and_any_strides_pack_alike(dtype):
    values = torch.randint(0, 8, (64, 3))
    for plane, expected in zip(pack_int3(values.to(dtype).T), pack_int3(values.T.contiguous()), strict=True):
        assert torch.equal(plane, expected)


@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0)])
def test_nothing_packs_to_nothing(shape):
    low, high = pack_int3(torch.zeros(shape, dtype=torch.uint8))
    assert low.shape == (*shape[:-1], shape[-1] // 16)
    assert high.shape == (*shape[:-1], shape[-1] // 32)
    assert unpack_int3(low, high).shape == shape


def test_what_does_not_fit_is_refused_with_its_value():
    with pytest.raises(ValueError, match="cannot pack 48 values: not a multiple of 32"):
        pack_int3(torch.zeros(2, 48, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"values span 0\.\.8, expected 0\.\.7"):
        pack_int3(torch.tensor(only(e3=8)))
    with pytest.raises(ValueError, match=r"values span -1\.\.3, expected 0\.\.7"):
        pack_int3(torch.tensor(only(e0=-1, e9=3), dtype=torch.int8))
    with pytest.raises(ValueError, match=r"values span 0\.\.256, expected 0\.\.7"):
        pack_int3(torch.tensor(only(e0=256)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("plane", ["low", "high"])
def test_words_of_another_dtype_are_refused(plane, dtype):
    planes = {"low": torch.zeros(2, 2).int(), "high": torch.zeros(2, 1).int()}
    planes[plane] = planes[plane].to(dtype)
    with pytest.raises(ValueError, match=f"packed words are {dtype}, expected torch.int32"):
        unpack_int3(**planes)


@pytest.mark.parametrize(("low", "high"), [((2, 3), (2, 1)), ((3, 2), (2, 1)), ((2,), (1, 1))])
def test_planes_that_disagree_are_refused(low, high):
    with pytest.raises(ValueError, match="expected twice as many low words"):
        unpack_int3(torch.zeros(low).int(), torch.zeros(high).int())
