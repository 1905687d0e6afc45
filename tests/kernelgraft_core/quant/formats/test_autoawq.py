"""AutoAWQ's GEMM layout against a packer in plain Python, both ways and bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.autoawq import pack_gemm, unpack_gemm
from kernelgraft_core.quant.w4a16 import W4A16Weight

RELAXED = settings(deadline=None, max_examples=50)  # other processes take their time too

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
SHAPES = st.tuples(st.integers(1, 4).map(lambda words: 8 * words), st.integers(1, 3), st.sampled_from([8, 16, 24, 64]))


def pack_columns(rows):
    """Rows of 4-bit integers as int32 words: nibble ``i`` of word ``c`` is column ``8 c + COLUMN_OF_NIBBLE[i]``."""
    packed = []
    for row in rows:
        words = []
        for c in range(len(row) // 8):
            word = sum(row[8 * c + column] << (4 * nibble) for nibble, column in enumerate(COLUMN_OF_NIBBLE))
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return packed


def random_layer(n, groups, size, seed):
    """Integers ``(K, N)``, zero points ``(G, N)`` and float16 scales ``(G, N)``."""
    random = np.random.default_rng(seed)
    integers, zeros = random.integers(0, 16, (groups * size, n)), random.integers(0, 16, (groups, n))
    return integers, zeros, (random.random((groups, n)) + 0.01).astype(np.float16)


def stored(integers, zeros, scales):
    words = (torch.tensor(pack_columns(t.tolist()), dtype=torch.int32) for t in (integers, zeros))
    return (*words, torch.from_numpy(scales))


def bits(tensor):
    return tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor


def assert_same_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is b.dtype
        assert a.is_contiguous()
        assert torch.equal(bits(a), bits(b))


def test_golden_bytes():
    """Computed by hand: row k of the layer counts up from k, the zero points count down from 15."""
    count = torch.arange(8)
    weight = W4A16Weight.from_integers(count.unsqueeze(1) + count, torch.full((8, 1), 0.5), (15 - count).unsqueeze(1))
    qweight, qzeros, scales = (tensor.numpy().tobytes().hex(" ", 4) for tensor in pack_gemm(weight))
    assert qweight == "20643175 31754286 42865397 539764a8 64a875b9 75b986ca 86ca97db 97dba8ec"
    assert qzeros == "df9bce8a"
    assert scales == "00380038 00380038 00380038 00380038"


@RELAXED
@given(SHAPES, st.integers(0, 2**16))
def test_reads_what_a_plain_packer_writes(shape, seed):
    integers, zeros, scales = random_layer(*shape, seed)
    weight = unpack_gemm(*stored(integers, zeros, scales))
    assert weight.group_size == shape[2]
    assert np.array_equal(weight.integers().numpy(), integers.T)
    assert np.array_equal(weight.zeros.numpy(), zeros.T)
    assert np.array_equal(weight.scales.numpy(), scales.T)


@RELAXED
@given(SHAPES, st.integers(0, 2**16))
def test_writes_what_a_plain_packer_writes(shape, seed):
    integers, zeros, scales = random_layer(*shape, seed)
    weight = W4A16Weight.from_integers(*(torch.from_numpy(t).T for t in (integers, scales, zeros)))
    assert_same_bits(pack_gemm(weight), stored(integers, zeros, scales))


@RELAXED
@given(SHAPES, st.integers(0, 2**16))
def test_any_checkpoint_survives_the_round_trip_bit_for_bit(shape, seed):
    n, groups, size = shape
    random = np.random.default_rng(seed)
    words = [random.integers(-(2**31), 2**31, (rows, n // 8)).astype(np.int32) for rows in (groups * size, groups)]
    scales = random.integers(0, 2**16, (groups, n)).astype(np.uint16).view(np.float16)  # NaN and subnormals included
    checkpoint = (*map(torch.from_numpy, words), torch.from_numpy(scales))
    assert_same_bits(pack_gemm(unpack_gemm(*checkpoint)), checkpoint)


def layer_of(k, n, groups):
    return (
        torch.zeros(k, n // 8, dtype=torch.int32),
        torch.zeros(groups, n // 8, dtype=torch.int32),
        torch.ones(groups, n, dtype=torch.float16),
    )


REFUSED = [
    pytest.param((*layer_of(128, 64, 2)[:1], *layer_of(128, 32, 2)[1:]), id="zeros-of-another-layer"),
    pytest.param((*layer_of(128, 64, 2)[:2], torch.ones(2, 56)), id="scales-cut-off"),
    pytest.param((*layer_of(128, 64, 2)[:2], torch.ones(1, 64)), id="scales-of-another-group-size"),
    pytest.param((layer_of(127, 64, 2)[0], *layer_of(128, 64, 2)[1:]), id="rows-cut-off"),
    pytest.param(layer_of(128, 64, 3), id="groups-do-not-divide"),
    pytest.param(layer_of(128, 64, 0), id="no-groups"),
    pytest.param(
        # GEMV: qweight (N, K / 8), qzeros (N, K / g / 8 rounded up), scales (N, 8 * that)
        (torch.zeros(64, 16, dtype=torch.int32), torch.zeros(64, 1, dtype=torch.int32), torch.ones(64, 8)),
        id="gemv",
    ),
]


@pytest.mark.parametrize("tensors", REFUSED)
def test_tensors_that_are_not_one_layer_are_refused_with_their_shapes(tensors):
    with pytest.raises(ValueError, match="are not one AutoAWQ GEMM layer") as caught:
        unpack_gemm(*tensors)
    assert all(str(tuple(t.shape)) in str(caught.value) for t in tensors)


@pytest.mark.parametrize("position", [0, 1], ids=["qweight", "qzeros"])
@pytest.mark.parametrize("change", [torch.Tensor.long, torch.Tensor.half, torch.Tensor.flatten])
def test_words_of_another_dtype_or_rank_are_refused(position, change):
    tensors = list(layer_of(128, 64, 2))
    tensors[position] = change(tensors[position])
    name = ("qweight", "qzeros")[position]
    with pytest.raises(ValueError, match=rf"{name} is torch\.\w+ \(.*expected two-dimensional torch.int32"):
        unpack_gemm(*tensors)


def test_a_layer_whose_columns_do_not_fill_words_cannot_be_written():
    weight = W4A16Weight.from_integers(torch.zeros(12, 16), torch.ones(12, 1), torch.zeros(12, 1))
    with pytest.raises(ValueError, match="packs 8 columns to a word; this layer has 12"):
        pack_gemm(weight)
