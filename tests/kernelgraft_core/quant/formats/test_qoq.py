"""Our format of QoQ checkpoints: bytes, round trips, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.runtime.errors import CheckpointError

from .layout_cases import random_weight

RELAXED = settings(deadline=None, max_examples=25)


def weight_of(n, k, group, seed=0, zero="pre"):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    q, scale = draw(0, 15, n, k), torch.rand(n, generator=generator) + 0.01
    if group == -1:
        return W4A8Weight.from_integers(q, scale, zero=draw(0, 15, n))
    step = draw(1, 8, n, k // group)
    offset = draw(0, 15, n, k // group) * step if zero == "pre" else draw(0, 120, n, k // group)
    return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=offset)


@RELAXED
@given(
    st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 8, -1]),
    st.sampled_from(["pre", "post"]),
)  # fmt: skip
def test_a_weight_comes_back_bit_for_bit(seed, n, groups, group, zero):
    weight = weight_of(n, groups * (8 if group == -1 else group), group, seed, zero)
    layout = Qoq(4, group, zero_form=zero)
    tensors = layout.write(weight)
    assert tensors.keys() == layout.parts(n, weight.in_features).keys()
    found = layout.read(tensors)
    for ours, theirs in zip(found.tensors, weight.tensors, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert all(torch.equal(tensor, tensors[part]) for part, tensor in layout.write(found).items())


def test_the_bytes_are_those_of_the_description():
    weight = W4A8Weight.from_integers(
        torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([1.0, 0.5]),
        group_scale=torch.tensor([[2, 3], [1, 4]]), group_zero=torch.tensor([[4, 9], [0, 8]]),
    )  # fmt: skip
    pre, post = (Qoq(4, 2, zero_form=form).write(weight) for form in ("pre", "post"))
    assert pre["qweight"].tolist() == post["qweight"].tolist() == [[0x21, 0x43], [0x65, 0x87]]
    assert pre["scale"].tolist() == [1.0, 0.5]
    assert pre["group_scale"].tolist() == [[2, 3], [1, 4]]
    assert pre["group_zero"].tolist() == [[2, 3], [0, 2]]
    assert post["group_zero"].tolist() == [[4, 9], [0, 8]]
    channel = W4A8Weight.from_integers(torch.tensor([[1, 2, 3, 4]]), torch.ones(1), zero=torch.tensor([7]))
    assert Qoq(4, -1).write(channel)["zero"].tolist() == [7]


@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("zero", ["pre", "post"])
def test_the_config_says_how_to_read_it(group, zero):
    layout = Qoq(4, group, zero_form=zero)
    config = layout.config(["mlp.gate"])
    assert find_layout(config) == layout
    assert config["quant_method"] == "qoq"
    assert config["modules_to_not_convert"] == ["mlp.gate"]
    assert "kv_cache_scheme" not in config


def test_no_tensor_has_a_name_that_vllm_takes_for_the_caches():
    for group in (8, -1):
        assert not any(part.endswith(("k_scale", "v_scale", "q_scale")) for part in Qoq(4, group).parts(4, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version = 2, expected 1"),
        ({"act_bits": 4}, "act_bits = 4, expected 8"),
        ({"bits": 3}, "bits = 3, but qoq has 4"),
        ({"zero": "middle"}, "zero = 'middle', expected pre or post"),
        ({"group_size": 0}, "group_size = 0"),
    ],
)
def test_configs_of_another_kind_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        find_layout(Qoq(4, 8).config(None) | change)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scale", torch.tensor([1.0, torch.nan]).half(), "scale is not finite everywhere"),
        ("group_scale", torch.zeros(2, 2, dtype=torch.uint8), "group_scale holds zeros"),
        ("group_zero", torch.full((2, 2), 16, dtype=torch.uint8), "group_zero goes up to 16"),
        ("group_scale", torch.full((2, 2), 60, dtype=torch.uint8), "which is no int8|times group_scale"),
        ("qweight", torch.zeros(2, 8, dtype=torch.int32), r"qweight is int32 \(2, 8\)"),
    ],
)
def test_values_that_are_no_weight_are_refused(part, value, message):
    tensors = Qoq(4, 8).write(weight_of(2, 16, 8)) | {part: value}
    with pytest.raises(ValueError, match=message):
        Qoq(4, 8).read(tensors)


def test_what_the_format_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"zero points are no multiples of their scales: .* zero = 'post'"):
        Qoq(4, 8).write(weight_of(4, 16, 8, zero="post"))
    with pytest.raises(ValueError, match="the weight has groups of 8, the format 4"):
        Qoq(4, 4).write(weight_of(4, 16, 8))
    with pytest.raises(ValueError, match="the weight has groups of 16, the format 8"):
        Qoq(4, 8).write(weight_of(4, 16, -1))
    with pytest.raises(ValueError, match="holds weights for activations of 8 bits, not a W4A16Weight"):
        Qoq(4, 8).write(random_weight(Gemm(4, 8), 8, 16, 0))
    with pytest.raises(ValueError, match="have to be even"):
        Qoq(4, 5).parts(4, 15)
