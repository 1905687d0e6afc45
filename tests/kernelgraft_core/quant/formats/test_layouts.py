"""What every layout promises: reading undoes writing, and nothing but its own tensors is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.formats.layout import FLOATS, StoredTensor
from kernelgraft_core.quant.formats.native import Native

from .layout_cases import LAYOUTS, SHAPES, random_weight, same_bits, width

RELAXED = settings(deadline=None, max_examples=25)
EVERY = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@EVERY
@RELAXED
@given(SHAPES, st.integers(0, 2**16))
def test_reading_undoes_writing_bit_for_bit(make, shape, seed):
    size, groups, n = shape
    layout = make(group_size=size)
    weight = random_weight(layout, n, width(layout, size, groups), seed)
    tensors = layout.write(weight)
    again = layout.read(tensors)
    assert type(again) is type(weight)
    assert all(same_bits(a, b) for a, b in zip(again.tensors, weight.tensors, strict=True))
    rewritten = layout.write(again)
    assert rewritten.keys() == tensors.keys()
    assert all(same_bits(rewritten[part], tensors[part]) for part in tensors)


@EVERY
@RELAXED
@given(SHAPES)
def test_parts_foretell_what_is_written(make, shape):
    size, groups, n = shape
    layout = make(group_size=size)
    k = width(layout, size, groups)
    tensors = layout.write(random_weight(layout, n, k, 0))
    foretold = {part: wanted.written for part, wanted in layout.parts(n, k).items()}
    found = {part: StoredTensor.of(tensor) for part, tensor in tensors.items()}
    assert list(found.items()) == list(foretold.items())
    assert layout.check(found) == (n, k)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert all(found[part].bytes == tensor.nbytes for part, tensor in tensors.items())


@EVERY
def test_whole_rows_are_one_group(make):
    layout = make(group_size=-1)
    weight = random_weight(layout, 16, 192, 0)
    assert weight.scales.shape == (16, 1)
    assert torch.equal(layout.read(layout.write(weight)).integers(), weight.integers())


@EVERY
def test_a_layer_without_one_of_its_tensors_is_refused_by_name(make):
    layout = make(group_size=64)
    tensors = layout.write(random_weight(layout, 16, 128, 0))
    for part in tensors:
        with pytest.raises(ValueError, match=f"{part} is missing"):
            layout.read({p: t for p, t in tensors.items() if p != part})


@EVERY
def test_tensors_of_another_shape_dtype_or_group_size_are_refused_by_name(make):
    layout = make(group_size=64)
    weight = random_weight(layout, 16, 128, 0)
    tensors = layout.write(weight)
    for part, tensor in tensors.items():
        other = tensor.float() if tensor.dtype not in FLOATS else tensor.to(torch.int8)
        for wrong in (tensor.flatten()[:-1], tensor[None], other):
            with pytest.raises(ValueError, match=r"expected two dimensions|\w+ is .*, but|N = |K = "):
                layout.read(tensors | {part: wrong})
    with pytest.raises(ValueError, match="group size 32 goes with"):
        make(group_size=32).read(tensors)


@EVERY
def test_a_bias_is_no_part_but_must_have_the_layers_length(make):
    layout = make(group_size=64)
    tensors = layout.write(random_weight(layout, 16, 128, 0))
    assert layout.read(tensors | {"bias": torch.zeros(16, dtype=torch.bfloat16)}).out_features == 16
    for wrong in (torch.zeros(8), torch.zeros(16, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"bias is .*, expected \(16,\)"):
            layout.read(tensors | {"bias": wrong})


@EVERY
def test_tensors_of_other_formats_are_refused(make):
    layout = make(group_size=64)
    tensors = layout.write(random_weight(layout, 16, 128, 0))
    with pytest.raises(ValueError, match="weight, weight_scale_2 is no part of a layer in"):
        layout.read(tensors | {"weight_scale_2": torch.ones(1), "weight": torch.ones(16, 128)})
    for name in ("g_idx", "weight_g_idx"):
        with pytest.raises(ValueError, match="act-order"):
            layout.read(tensors | {name: torch.zeros(128, dtype=torch.int32)})


@EVERY
def test_groups_must_divide_the_row(make):
    layout = make(group_size=128)
    with pytest.raises(ValueError, match="K = 192 is no multiple of group size 128"):
        layout.parts(16, 192)


@EVERY
def test_a_weight_of_other_bits_or_groups_is_not_written(make):
    layout = make(group_size=64)
    with pytest.raises(ValueError, match="the weight has groups of 32, the format 64"):
        layout.write(random_weight(make(group_size=32), 16, 128, 0))
    other = Native(bits=7 - layout.bits, group_size=64)
    with pytest.raises(ValueError, match=f"the weight has {other.bits} bits, the format {layout.bits}"):
        layout.write(random_weight(other, 16, 128, 0))


@pytest.mark.parametrize("layout", [PackQuantized(symmetric=True, group_size=64), Native(3, 64, True)])
def test_zero_points_are_not_dropped(layout):
    weight = random_weight(layout, 16, 128, 0)
    weight.zeros[3, 1] -= 1
    with pytest.raises(ValueError, match=f"symmetric, but zero points are not all {layout.zero}"):
        layout.write(weight)


SETTINGS = [
    ({"bits": 3}, "bits = 3, but AutoAWQ GEMM has 4"),
    ({"bits": 8}, "bits = 8"),
    ({"group_size": 0}, "group_size = 0, expected a positive number, or -1"),
    ({"group_size": -2}, "group_size = -2"),
    ({"group_size": None}, "group_size = None"),
    ({"group_size": "128"}, "group_size = '128'"),
    ({"group_size": 32.0}, "group_size = 32.0"),
    ({"group_size": True}, "group_size = True"),
    ({"symmetric": True}, "symmetric = True, but AutoAWQ GEMM always stores zero points"),
]


@pytest.mark.parametrize(("given", "message"), SETTINGS)
def test_settings_that_a_format_has_not_are_refused_with_their_value(given, message):
    with pytest.raises(ValueError, match=message):
        Gemm(**given)


SIZES = [
    ("gemm", 12, 64, "N = 12 and K = 64"),
    ("gemv", 12, 64, "N = 12 and K = 64"),
    ("llm-awq", 12, 64, "N = 12 and K = 64"),
    ("llm-awq", 16, 96, "N = 16 and K = 96"),
    ("compressed-tensors", 16, 12, "K = 12"),
    ("native-4", 16, 12, "K = 12 and groups of 12, but 4 bits need multiples of 8"),
    ("native-3", 16, 48, "K = 48 and groups of 48, but 3 bits need multiples of 32"),
]


@pytest.mark.parametrize(("name", "n", "k", "message"), SIZES)
def test_sizes_that_a_format_cannot_hold_are_refused_with_their_value(name, n, k, message):
    with pytest.raises(ValueError, match=message):
        LAYOUTS[name](group_size=-1).parts(n, k)


@pytest.mark.parametrize("name", ["compressed-tensors", "native-4", "native-3"])
@pytest.mark.parametrize("n", [1, 7, 9])
def test_some_formats_take_any_number_of_rows(name, n):
    layout = LAYOUTS[name](group_size=32)
    weight = random_weight(layout, n, 64, n)
    assert all(same_bits(a, b) for a, b in zip(layout.read(layout.write(weight)).tensors, weight.tensors, strict=True))
