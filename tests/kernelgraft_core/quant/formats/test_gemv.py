"""AutoAWQ's GEMV layout: bytes by hand, and against a packer in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.autoawq import Gemv, padded_groups
from kernelgraft_core.quant.w4a16 import W4A16Weight

from .layout_cases import SHAPES, hexed, random_weight

RELAXED = settings(deadline=None, max_examples=25)


def test_golden_bytes():
    """Computed by hand: row n counts up from n, its zero point is 15 - n; one group of 32 is padded to 32 columns."""
    n, k = torch.arange(8).unsqueeze(1), torch.arange(32)
    weight = W4A16Weight.from_integers((n + k) % 16, torch.full((8, 1), 0.5), 15 - n)
    tensors = Gemv(group_size=32).write(weight)
    assert hexed(tensors["qweight"][:2]) == (
        "10325476 98badcfe 10325476 98badcfe 21436587 a9cbed0f 21436587 a9cbed0f"  # from 0, from 1
    )
    assert hexed(tensors["qzeros"][:2]) == "0f000000 00000000 00000000 00000000 0e000000 00000000 00000000 00000000"
    assert hexed(tensors["scales"][0], 2) == "0038" + " 0000" * 31


def words_of(row):
    """Little end first, in natural order."""
    values = [sum(int(v) << (4 * i) for i, v in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
    return [value - 2**32 if value >= 2**31 else value for value in values]


@RELAXED
@given(SHAPES, st.integers(0, 2**16))
def test_writes_what_a_plain_packer_writes(shape, seed):
    size, groups, n = shape
    layout = Gemv(group_size=size)
    weight = random_weight(layout, n, size * groups, seed)
    tensors = layout.write(weight)
    padded = padded_groups(size * groups, size)
    zeros, scales = np.zeros((n, padded), int), np.zeros((n, padded), np.float16)
    zeros[:, :groups], scales[:, :groups] = weight.zeros.numpy(), weight.scales.numpy()
    assert tensors["qweight"].tolist() == [words_of(row) for row in weight.integers().tolist()]
    assert tensors["qzeros"].tolist() == [words_of(row) for row in zeros]
    assert np.array_equal(tensors["scales"].numpy(), scales)


@pytest.mark.parametrize(
    ("k", "size", "columns"),
    [(128, 128, 8), (1024, 128, 8), (1152, 128, 16), (4096, 128, 32), (64, 64, 16), (1088, 64, 32), (32, 32, 32),
     (1056, 32, 64), (4096, -1, 8), (64, -1, 16), (4096, 256, 16)],
)  # fmt: skip
def test_scales_are_padded_to_what_the_kernel_reads_at_once(k, size, columns):
    assert padded_groups(k, size) == columns


@pytest.mark.parametrize("size", [8, 16, 96, 132])
def test_other_group_sizes_are_refused(size):
    message = f"group size {size}, but the layout has 32, 64 and multiples of 8 from 128 on"
    with pytest.raises(ValueError, match=message):
        padded_groups(8 * 132, size)
