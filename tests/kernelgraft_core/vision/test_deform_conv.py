"""Deformable convolution, plain and modulated, against its definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.runtime.testing import assert_close, rng
from kernelgraft_core.vision import deform_conv
from kernelgraft_core.vision.deform_conv import Window, deform_conv2d, deform_conv2d_backward, output_size

from . import definitions

WINDOWS = {
    "plain": Window(),
    "strided": Window((2, 1), (1, 2), (1, 2), 1, 1),
    "groups": Window((1, 2), (1, 1), (2, 1), 2, 1),
    "deform-groups": Window((1, 1), (1, 1), (1, 1), 1, 4),
    "both": Window((2, 2), (2, 0), (1, 1), 2, 4),
}


def arguments(window, dtype=torch.double, *, size=(5, 6), images=2, spread=2.0, modulated=True, kernel=(3, 2)):
    x = torch.randn(images, 4, *size, dtype=torch.double, generator=rng()).to(dtype)
    weight = torch.randn(6, 4 // window.groups, *kernel, dtype=torch.double, generator=rng(1)).to(dtype)
    places = (images, window.deform_groups * kernel[0] * kernel[1])
    out = output_size(x, weight, window)
    offset = (torch.randn(places[0], 2 * places[1], *out, dtype=torch.double, generator=rng(2)) * spread).to(dtype)
    mask = torch.rand(*places, *out, dtype=torch.double, generator=rng(3)).to(dtype) if modulated else None
    bias = torch.randn(6, dtype=torch.double, generator=rng(4)).to(dtype) if modulated else None
    return x, offset, weight, bias, mask


def defined(args, window):
    how = window.stride, window.padding, window.dilation, window.groups, window.deform_groups
    return definitions.deform_conv2d(*args, *how)


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_value_and_every_gradient(name, modulated):
    window = WINDOWS[name]
    args = [each if each is None else each.requires_grad_() for each in arguments(window, modulated=modulated)]
    found, wanted = deform_conv2d(*args, window), defined(args, window)
    assert_close("out", wanted, found, 1e-12)
    grad = torch.randn(wanted.shape, dtype=torch.double, generator=rng(5))
    leaves = {k: v for k, v in zip(("x", "offset", "weight", "bias", "mask"), args, strict=True) if v is not None}
    ours, theirs = (torch.autograd.grad(out, list(leaves.values()), grad) for out in (found, wanted))
    for which, mine, right in zip(leaves, ours, theirs, strict=True):
        assert_close(f"grad_{which}", right, mine, 1e-11)


@pytest.mark.parametrize("at_once", [1, 200, 700])
def test_parts_give_what_the_whole_gives(monkeypatch, at_once):
    window = WINDOWS["both"]
    x, offset, weight, bias, mask = arguments(window, images=3)
    whole = deform_conv2d(x, offset, weight, bias, mask, window)
    grad = torch.randn(whole.shape, dtype=torch.double, generator=rng(5))
    gradients = deform_conv2d_backward(grad, x, offset, weight, mask, window)
    monkeypatch.setattr(deform_conv, "COLUMNS_AT_ONCE", at_once)
    assert_close("out", whole, deform_conv2d(x, offset, weight, bias, mask, window), 1e-14)
    again = deform_conv2d_backward(grad, x, offset, weight, mask, window)
    for wanted, found in zip(gradients, again, strict=True):
        assert_close("gradient", wanted, found, 1e-13)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_without_offsets_it_is_a_convolution(size, stride, padding, dilation):
    window = Window(stride, padding, dilation)
    x = torch.randn(2, 4, *size, dtype=torch.double, generator=rng())
    weight = torch.randn(6, 4, 3, 2, dtype=torch.double, generator=rng(1))
    out = output_size(x, weight, window)
    if min(out) < 1:
        with pytest.raises(ValueError, match="the output would be"):
            deform_conv2d(x, x.new_zeros(2, 12, 1, 1), weight, window=window)
        return
    found = deform_conv2d(x, x.new_zeros(2, 12, *out), weight, window=window)
    torch.testing.assert_close(found, F.conv2d(x, weight, None, stride, padding, dilation))


@pytest.mark.parametrize(
    "wanted", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
)
def test_only_what_is_wanted_is_computed(wanted):
    window = WINDOWS["plain"]
    x, offset, weight, _, mask = arguments(window)
    grad = torch.randn(2, 6, *offset.shape[2:], dtype=torch.double, generator=rng(5))
    every = deform_conv2d_backward(grad, x, offset, weight, mask, window)
    some = deform_conv2d_backward(grad, x, offset, weight, mask, window, wanted)
    for need, full, found in zip(wanted, every, some, strict=True):
        assert (found is not None) == need
        if need:
            assert_close("gradient", full, found, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype):
    window = WINDOWS["both"]
    args = arguments(window, dtype)
    found = deform_conv2d(*args, window)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close("out", defined([each.double() for each in args], window), found, tolerance)
    x, offset, weight, _, mask = args
    gradients = deform_conv2d_backward(found, x, offset, weight, mask, window)
    assert [each.dtype for each in gradients] == [dtype] * 4


def test_offsets_far_outside_and_nan_read_zeros():
    window = Window()
    x, offset, weight, _, _ = arguments(window, torch.float32, modulated=False)
    for far in (1e9, -1e30, float("inf"), float("nan")):
        out = deform_conv2d(x, torch.full_like(offset, far), weight, window=window)
        assert not out.any()
        by_x, by_offset, *_ = deform_conv2d_backward(out + 1, x, torch.full_like(offset, far), weight, None, window)
        assert not by_x.any()
        assert not by_offset.any()


def test_one_pixel_and_no_images_and_strided_inputs():
    window = Window(padding=(1, 1))
    x, weight = torch.randn(1, 4, 1, 1, generator=rng()), torch.randn(6, 4, 3, 3, generator=rng(1))
    offset = torch.zeros(1, 18, 1, 1)
    torch.testing.assert_close(deform_conv2d(x, offset, weight, window=window), F.conv2d(x, weight, padding=1))
    none = deform_conv2d(x[:0], offset[:0], weight, window=window)
    assert none.shape == (0, 6, 1, 1)
    grads = deform_conv2d_backward(none, x[:0], offset[:0], weight, None, window)
    assert grads[0].shape == (0, 4, 1, 1)
    assert not grads[2].any()
    both = Window((2, 2), (2, 0), (1, 1), 2, 4)
    args = arguments(both)
    strided = [each if each is None else each.transpose(0, -1).contiguous().transpose(0, -1) for each in args]
    torch.testing.assert_close(deform_conv2d(*strided, both), deform_conv2d(*args, both))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offset": torch.zeros(2, 11, 3, 5)}, "offset is"),
        ({"mask": torch.zeros(2, 5, 3, 5)}, "mask is"),
        ({"bias": torch.zeros(5)}, "bias is"),
        ({"weight": torch.zeros(6, 3, 3, 2)}, "has 4 channels"),
        ({"window": Window(groups=3)}, "3 groups"),
        ({"window": Window(stride=(0, 1))}, "from 1"),
        ({"x": torch.zeros(2, 4, 5)}, "both 4-D"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    x, offset, weight, bias, mask = arguments(Window(), torch.float32)
    args = {"x": x, "offset": offset, "weight": weight, "bias": bias, "mask": mask, "window": Window(), **changed}
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**args)
