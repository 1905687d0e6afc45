"""QServe's layout: bytes by hand, the place of every single weight, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.layout import StoredTensor
from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.formats.qserve import QServe, pack_tiles, unpack_tiles
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.runtime.errors import CheckpointError

from .layout_cases import hexed, random_weight

RELAXED = settings(deadline=None, max_examples=25)
ORDERS = st.sampled_from(["qserve", "deepcompressor"])


def weight_of(n, k, group, seed=0):
    """A weight that QServe's kernels multiply, as random as it may be."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(0, high + 1, shape, generator=generator)

    q, scale = draw(15, n, k), torch.rand(n, generator=generator) + 0.01
    if group == -1:
        return W4A8Weight.from_integers(q, scale, zero=draw(15, n))
    step = 1 + draw(16, n, k // group)
    lowest = (15 * step - 127).clamp(min=0)
    offset = lowest + (torch.rand(step.shape, generator=generator) * (129 - lowest)).long()
    return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=offset)


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_golden_bytes_of_weights():
    """Computed by hand. Row 0 counts up, row 16, which shares its bytes, down; row 8 is all 5."""
    q = torch.zeros(32, 32, dtype=torch.int64)
    q[0], q[16], q[8] = torch.arange(32) % 16, 15 - torch.arange(32) % 16, 5
    packed = QServe(group_size=-1).write(W4A8Weight.from_integers(q, torch.ones(32), zero=torch.zeros(32)))["qweight"]
    assert packed.dtype is torch.int8
    counting = ["f0e1d2c3", "b4a59687", "78695a4b", "3c2d1e0f"]
    assert hexed(packed.flatten()[:64]) == " ".join(f"{word} 05050505 {word} 05050505" for word in counting)
    assert not packed.flatten()[64:].any()


def test_golden_bytes_of_scales_and_zeros():
    """Row n has scale n + 1 and zero point 2 n, whose negative is stored."""
    rows = torch.arange(32).unsqueeze(1)
    weight = W4A8Weight.from_integers(
        torch.ones(32, 128), torch.full((32,), 0.5), group_scale=rows + 1, group_zero=2 * rows
    )
    tensors = QServe().write(weight)
    assert hexed(tensors["s1_scales"], 2) == " ".join(["0038"] * 32)
    assert hexed(tensors["s2_scales"]) == "01091119 020a121a 030b131b 040c141c 050d151d 060e161e 070f171f 08101820"
    assert hexed(tensors["s2_zeros"]) == "00f0e0d0 feeedece fcecdccc faeadaca f8e8d8c8 f6e6d6c6 f4e4d4c4 f2e2d2c2"
    other = QServe(s2_order="deepcompressor").write(weight)
    assert hexed(other["s2_scales"]) == "0109020a 030b040c 050d060e 070f0810 1119121a 131b141c 151d161e 171f1820"
    assert torch.equal(other["qweight"], tensors["qweight"])


def test_golden_bytes_per_channel():
    weight = W4A8Weight.from_integers(torch.zeros(32, 32), torch.full((32,), 0.5), zero=torch.arange(32) % 16)
    zeros = QServe(group_size=-1).write(weight)["s1_szeros"]
    assert hexed(zeros[:8], 2) == "0000 0038 003c 003e 0040 0041 0042 0043"


PLACES = st.tuples(st.integers(0, 95), st.integers(0, 63), st.integers(1, 15))


@RELAXED
@given(PLACES)
def test_every_weight_has_the_place_that_the_definition_says(place):
    row, column, value = place
    q = torch.zeros(96, 64, dtype=torch.int32)
    q[row, column] = value
    h, m, lane = row % 32 // 16, row % 16 // 8, row % 8
    a, c, r = column % 32 // 16, column % 16 // 4, column % 4
    byte = 512 * (2 * (row // 32) + column // 32) + 64 * lane + 16 * c + 8 * a + 4 * m + r
    packed = pack_tiles(q).flatten()
    assert packed.nonzero().tolist() == [[byte]]
    assert int(packed[byte]) & 255 == value << (4 * h)


@RELAXED
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3))
def test_any_bytes_survive_the_round_trip(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-128, 128, (32 * rows, 16 * columns), generator=generator, dtype=torch.int8)
    assert torch.equal(pack_tiles(unpack_tiles(packed)), packed)


@RELAXED
@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 3), st.sampled_from([128, -1]), ORDERS)
def test_a_weight_comes_back_bit_for_bit(seed, tiles, groups, group, order):
    layout, k = QServe(group_size=group, s2_order=order), groups * (128 if group == 128 else 32)
    weight = weight_of(32 * tiles, k, group, seed)
    tensors = layout.write(weight)
    assert {part: StoredTensor.of(tensor) for part, tensor in tensors.items()} == {
        part: wanted.written for part, wanted in layout.parts(32 * tiles, k).items()
    }
    found = layout.read(tensors)
    assert same(found, weight)
    assert all(torch.equal(tensor, tensors[part]) for part, tensor in layout.write(found).items())


@pytest.mark.parametrize("order", ["qserve", "deepcompressor"])
def test_a_file_means_what_qserves_kernel_computes(order):
    """``q * s2_scales + s2_zeros`` modulo 256, rows of the scales found by their position."""
    tensors = QServe(s2_order=order).write(weight_of(64, 256, 128))
    positions = torch.arange(32).view(4, 8).T if order == "qserve" else torch.arange(32).view(2, 2, 8).mT
    row_at = torch.cat([positions.flatten(), 32 + positions.flatten()])
    step, zero = torch.empty(2, 64, dtype=torch.int32), torch.empty(2, 64, dtype=torch.int32)
    step[:, row_at], zero[:, row_at] = tensors["s2_scales"].int(), tensors["s2_zeros"].int()
    q = unpack_tiles(tensors["qweight"]).view(64, 2, 128).int()
    bytes_ = ((q * step.T.unsqueeze(-1) + zero.T.unsqueeze(-1)) & 255).to(torch.uint8).view(torch.int8)
    assert torch.equal(QServe(s2_order=order).read(tensors).int8(), bytes_.view(64, 256))


def test_the_other_order_gives_another_weight():
    weight = weight_of(32, 128, 128)
    tensors = QServe(s2_order="deepcompressor").write(weight)
    assert same(QServe(s2_order="deepcompressor").read(tensors), weight)
    try:
        found = QServe().read(tensors)
    except ValueError:
        return  # scales of other rows made int8 overflow
    assert not same(found, weight)


def test_zero_points_beyond_an_int8_are_taken_modulo_256():
    """DeepCompressor stores up to 255 in an int8: as minus what a byte holds."""
    q, step = torch.full((32, 128), 15), torch.full((32, 1), 17)
    weight = W4A8Weight.from_integers(q, torch.ones(32), group_scale=step, group_zero=torch.full((32, 1), 200))
    tensors = QServe().write(weight)
    assert set(tensors["s2_zeros"].flatten().tolist()) == {56}
    assert same(QServe().read(tensors), weight)


def test_qoq_checkpoints_hold_the_same_weight():
    weight = weight_of(32, 256, 128)
    qoq = Qoq(4, 128, zero_form="post")
    assert same(QServe().read(QServe().write(qoq.read(qoq.write(weight)))), weight)


def test_it_is_found_by_its_tensors():
    for group in (128, -1):
        tensors = QServe(group_size=group).write(weight_of(32, 256, group))
        stored = {f"a.{part}": StoredTensor.of(tensor) for part, tensor in tensors.items()}
        assert find_layout({"quant_method": "qserve"}, stored) == QServe(group_size=group)
    chosen = {"quant_method": "qserve", "group_size": 128, "s2_order": "deepcompressor"}
    assert find_layout(chosen) == QServe(s2_order="deepcompressor")
    assert QServe().config(["lm_head"]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 64}, "group_size = 64, but QServe has 128, and -1"),
        ({"s2_order": "natural"}, "s2_order = 'natural', expected qserve or deepcompressor"),
        ({"bits": 8}, "bits = 8, but QServe has 4"),
    ],
)
def test_settings_that_it_has_not_are_refused(settings, message):
    with pytest.raises(CheckpointError, match=message):
        find_layout({"quant_method": "qserve"} | settings)


@pytest.mark.parametrize(
    ("group", "part", "value", "message"),
    [
        (128, "s1_scales", torch.tensor([torch.inf] * 32).half(), "s1_scales is not finite everywhere"),
        (128, "s2_scales", torch.zeros(2, 32, dtype=torch.int8), r"s2_scales go down to 0, expected 1\.\.127"),
        (128, "s2_scales", torch.full((2, 32), 127, dtype=torch.int8), "which is no int8"),
        (128, "s2_scales", torch.ones(1, 32, dtype=torch.int8), r"s2_scales is int8 \(1, 32\), but qweight"),
        (128, "qweight", torch.zeros(32, 128, dtype=torch.uint8), r"qweight is uint8 \(32, 128\)"),
        (-1, "s1_szeros", torch.full((32,), 0.6).half(), r"s1_szeros\[0\] = .* is not the scale, 1\.0, times an int"),
        (-1, "s1_szeros", torch.full((32,), -1.0).half(), r"s1_szeros\[0\] = -1\.0 is not the scale"),
    ],
)
def test_values_that_are_no_weight_are_refused(group, part, value, message):
    weight = weight_of(32, 256, group)
    weight = W4A8Weight(weight.qweight, torch.ones(32).half(), weight.group_scale, weight.group_zero, weight.zero)
    layout = QServe(group_size=group)
    with pytest.raises(ValueError, match=message):
        layout.read(layout.write(weight) | {part: value})


def test_what_its_kernels_cannot_multiply_is_not_written():
    ones = torch.ones(32, 1)
    steep = W4A8Weight.from_integers(torch.ones(32, 128), torch.ones(32), group_scale=128 * ones, group_zero=100 * ones)
    with pytest.raises(ValueError, match="group_scale goes up to 128 and times q to 128; QServe's kernels multiply up"):
        QServe().write(steep)
    wide = W4A8Weight.from_integers(
        torch.full((32, 128), 15), torch.ones(32), group_scale=18 * ones, group_zero=150 * ones
    )
    with pytest.raises(ValueError, match="group_scale goes up to 18 and times q to 270"):
        QServe().write(wide)
    large = W4A8Weight.from_integers(torch.ones(32, 32), torch.full((32,), 60000.0), zero=torch.full((32,), 2))
    with pytest.raises(ValueError, match="s1_szeros, the scale times the zero point, is not finite"):
        QServe(group_size=-1).write(large)


@pytest.mark.parametrize(("n", "k"), [(48, 128), (32, 48)])
def test_sizes_that_it_cannot_hold_are_refused_with_their_value(n, k):
    with pytest.raises(ValueError, match=f"N = {n} and K = {k}, but QServe layers have multiples of 32"):
        QServe(group_size=-1).parts(n, k)


def test_weights_of_another_kind_are_not_written():
    with pytest.raises(ValueError, match="the weight has groups of 64, the format 128"):
        QServe().write(weight_of(32, 128, 64))
    with pytest.raises(ValueError, match="QServe holds weights for activations of 8 bits, not a W4A16Weight"):
        QServe().write(random_weight(Gemm(4, 128), 32, 128, 0))
