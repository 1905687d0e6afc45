"""compressed-tensors pack-quantized: bytes by hand, and against the compressed-tensors package where there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.w4a16 import W4A16Weight

from .layout_cases import hexed, random_weight, same_bits

RELAXED = settings(deadline=None, max_examples=50)
SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 4), st.sampled_from([8, 16, 24, 64]))


def test_golden_bytes():
    """Computed by hand: row n counts up from n and has zero point 15 - n. The zero points of a column fill words."""
    rows = torch.arange(9).unsqueeze(1)
    weight = W4A16Weight.from_integers((rows + torch.arange(8)) % 16, torch.full((9, 1), 0.5), 15 - rows)
    tensors = PackQuantized(group_size=8).write(weight)
    assert hexed(tensors["weight_packed"]) == (
        "10325476 21436587 32547698 436587a9 547698ba 6587a9cb 7698badc 87a9cbed 98badcfe"
    )
    assert hexed(tensors["weight_zero_point"]) == "efcdab89 07000000"
    assert hexed(tensors["weight_shape"], 8) == "0900000000000000 0800000000000000"
    assert hexed(tensors["weight_scale"], 2) == " ".join(["0038"] * 9)


@RELAXED
@given(SHAPES, st.integers(0, 2**16))
def test_the_package_packs_the_same(shape, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    n, groups, size = shape
    layout = PackQuantized(group_size=size)
    weight = random_weight(layout, n, groups * size, seed)
    tensors = layout.write(weight)
    signed = [(t.to(torch.int16) - 8).to(torch.int8) for t in (weight.integers(), weight.zeros)]
    assert torch.equal(tensors["weight_packed"], helpers.pack_to_int32(signed[0], 4))
    assert torch.equal(tensors["weight_zero_point"], helpers.pack_to_int32(signed[1], 4, packed_dim=0))
    assert torch.equal(helpers.unpack_from_int32(tensors["weight_packed"], 4, weight.integers().shape), signed[0])


@RELAXED
@given(SHAPES, st.integers(0, 2**32 - 1), st.booleans())
def test_any_checkpoint_survives_the_round_trip_bit_for_bit(shape, seed, symmetric):
    n, groups, size = shape
    layout = PackQuantized(group_size=size, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    zeros = words(-(-n // 8), groups)
    if n % 8:
        zeros[-1] &= (1 << (4 * (n % 8))) - 1  # what is left of a word is zero
    tensors = {
        "weight_packed": words(n, groups * size // 8),
        "weight_scale": words(n, groups).to(torch.int16).view(torch.float16),  # NaN and subnormals included
        "weight_shape": torch.tensor([n, groups * size]),
    } | ({} if symmetric else {"weight_zero_point": zeros})
    rewritten = layout.write(layout.read(tensors))
    assert rewritten.keys() == tensors.keys()
    assert all(same_bits(rewritten[part], tensors[part]) for part in tensors)


def test_symmetric_integers_are_stored_with_eight_added():
    layout = PackQuantized(group_size=8, symmetric=True)
    tensors = {
        "weight_packed": torch.tensor([[0x76543210]], dtype=torch.int32),
        "weight_scale": torch.tensor([[2.0]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 8]),
    }
    weight = layout.read(tensors)
    values = (weight.integers().float() - weight.zeros) * weight.scales
    assert values.tolist() == [[-16, -14, -12, -10, -8, -6, -4, -2]]


def test_a_shape_that_contradicts_the_words_is_refused():
    layout = PackQuantized(group_size=64)
    tensors = layout.write(random_weight(layout, 8, 128, 0))
    tensors["weight_shape"] = torch.tensor([8, 124])
    with pytest.raises(ValueError, match=r"weight_shape holds \(8, 124\), but weight_packed has \(8, 128\) integers"):
        layout.read(tensors)
