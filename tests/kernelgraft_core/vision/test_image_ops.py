"""Upsampling, masks, correlation, shifts, filters, resampling and activations against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.runtime.testing import assert_close, rng
from kernelgraft_core.vision import batch_norm
from kernelgraft_core.vision.bezier_align import bezier_align
from kernelgraft_core.vision.bias_act import ACTIVATIONS, bias_act, bias_act_derivative
from kernelgraft_core.vision.carafe import carafe
from kernelgraft_core.vision.correlation import Patches, correlation
from kernelgraft_core.vision.deform_conv import deform_conv2d
from kernelgraft_core.vision.masked_columns import masked_col2im, masked_im2col
from kernelgraft_core.vision.psa_mask import psa_mask, psa_mask_backward
from kernelgraft_core.vision.resample import Rates, filtered_leaky_relu, leaky_relu_by_signs, upfirdn2d
from kernelgraft_core.vision.rotated_feature_align import rotated_feature_align, rotated_feature_align_backward
from kernelgraft_core.vision.rotated_filters import active_rotated_filter, active_rotated_filter_backward
from kernelgraft_core.vision.temporal_shift import temporal_shift

from . import definitions


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.double, generator=rng(seed))


def agrees(found, wanted, leaves, tolerance=1e-12):
    assert_close("out", wanted, found, tolerance)
    grad = randn(*wanted.shape, seed=9)
    gradients = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for out in (found, wanted))
    for mine, right in zip(*gradients, strict=True):
        assert_close("gradient", right, mine, tolerance)


@pytest.mark.parametrize(("kernel_size", "groups", "scale"), [(1, 1, 1), (3, 1, 2), (5, 2, 1), (3, 2, 3)])
def test_carafe(kernel_size, groups, scale):
    x = randn(2, 4, 3, 4).requires_grad_()
    masks = randn(2, groups * kernel_size**2, 3 * scale, 4 * scale, seed=1).requires_grad_()
    how = kernel_size, groups, scale
    agrees(carafe(x, masks, *how), definitions.carafe(x, masks, *how), (x, masks))


def test_carafe_of_narrow_types_and_no_images_and_what_it_refuses():
    x, masks = randn(1, 2, 3, 3).half(), randn(1, 9, 6, 6).half()
    found = carafe(x, masks, 3, 1, 2)
    assert found.dtype == torch.float16
    assert_close("out", definitions.carafe(x.double(), masks.double(), 3, 1, 2), found, 1e-3)
    assert carafe(x[:0], masks[:0], 3, 1, 2).shape == (0, 2, 6, 6)
    with pytest.raises(ValueError, match="masks is"):
        carafe(x, masks, 3, 1, 1)
    with pytest.raises(ValueError, match="kernel_size 2"):
        carafe(x, masks, 2, 1, 2)


@pytest.mark.parametrize("distribute", [False, True])
@pytest.mark.parametrize("mask_size", [(1, 1), (3, 5), (2, 4), (9, 9)])
def test_psa_mask(mask_size, distribute):
    masks = randn(2, math.prod(mask_size), 4, 3).requires_grad_()
    found = psa_mask(masks, mask_size, distribute=distribute)
    wanted = definitions.psa_mask(masks, mask_size, distribute)
    agrees(found, wanted, (masks,))
    grad = randn(*wanted.shape, seed=1)
    (right,) = torch.autograd.grad(wanted, masks, grad)
    assert_close("gradient", right, psa_mask_backward(grad, mask_size, distribute=distribute), 0)


def test_psa_mask_refuses_masks_of_another_size():
    with pytest.raises(ValueError, match=r"expected \(N, 3 \* 3, H, W\)"):
        psa_mask(torch.zeros(1, 8, 2, 2), (3, 3))


@pytest.mark.parametrize(
    "patches",
    [
        Patches(),
        Patches((1, 1), (3, 5)),
        Patches((3, 2), (3, 3), (1, 1), (1, 2)),
        Patches((3, 3), (3, 1), (2, 1), (2, 0), (1, 1), (2, 1)),
        Patches((2, 2), (3, 3), (2, 3), (1, 1), (2, 2), (1, 3)),
        Patches((1, 1), (9, 9)),
    ],
)
def test_correlation(patches):
    first, second = randn(2, 3, 5, 6).requires_grad_(), randn(2, 3, 5, 6, seed=1).requires_grad_()
    how = patches.kernel, patches.patch, patches.stride, patches.padding, patches.dilation, patches.patch_dilation
    agrees(correlation(first, second, patches), definitions.correlation(first, second, *how), (first, second))


def test_correlation_refuses_what_does_not_fit():
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="the second image"):
        correlation(x, x[:, :1], Patches())
    with pytest.raises(ValueError, match="does not fit"):
        correlation(x, x, Patches(kernel=(4, 4)))
    with pytest.raises(ValueError, match="from 1"):
        correlation(x, x, Patches(stride=(0, 1)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=4, max_size=4), st.integers(1, 4))
def test_temporal_shift_moves_frames_and_moves_gradients_back(shifts, frames):
    x = randn(2, frames, 4, 3).requires_grad_()
    shift = torch.tensor(shifts, dtype=torch.int32).view(2, 2)
    wanted = 0 * x  # of its graph even where nothing is left
    for n in range(2):
        for c in range(4):
            for t in range(frames):
                target = t + int(shift[n, c // 2])
                if 0 <= target < frames:
                    wanted[n, target, c] = x[n, t, c]
    found = temporal_shift(x, shift)
    agrees(found, wanted, (x,), 0)
    grad = randn(*wanted.shape, seed=1)
    assert_close("gradient", torch.autograd.grad(found, x, grad)[0], temporal_shift(grad, -shift), 0)


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_align(points):
    x = randn(2, 3, 4, 5).requires_grad_()
    boxes = torch.rand(2, 4, 5, 5, dtype=torch.double, generator=rng(1)) * 40
    found = rotated_feature_align(x, boxes, 1 / 8, points)
    wanted = definitions.rotated_feature_align(x, boxes, 1 / 8, points)
    agrees(found, wanted, (x,))
    grad = randn(*wanted.shape, seed=2)
    (right,) = torch.autograd.grad(wanted, x, grad)
    assert_close("gradient", right, rotated_feature_align_backward(grad, boxes, 1 / 8, points), 1e-12)
    with pytest.raises(ValueError, match="points is 3"):
        rotated_feature_align(x, boxes, 1 / 8, 3)


def test_active_rotated_filters_put_every_entry_in_its_place():
    weight = randn(2, 3, 2, 1, 3).requires_grad_()
    indices = torch.stack([torch.randperm(6, generator=rng(i)) + 1 for i in range(4)], 1).view(2, 1, 3, 4).int()
    wanted = torch.zeros(2, 4, 3, 6, dtype=torch.double)
    for entry in range(6):
        for r in range(4):
            place = int(indices.view(6, 4)[entry, r]) - 1
            wanted[:, r, :, place] = weight.flatten(2)[:, :, entry]
    wanted = wanted.view(8, 6, 1, 3)
    agrees(active_rotated_filter(weight, indices), wanted, (weight,), 1e-15)
    grad = randn(8, 6, 1, 3, seed=1)
    (right,) = torch.autograd.grad(wanted, weight, grad)
    assert_close("gradient", right, active_rotated_filter_backward(grad, indices, weight.shape), 1e-15)


def test_masked_columns_are_those_of_a_convolution():
    x, weight = randn(1, 2, 5, 6), randn(4, 2, 3, 2, seed=1)
    dense = F.conv2d(x, weight, padding=(1, 2))
    places = torch.randperm(dense[0, 0].numel(), generator=rng(2))[:9]
    rows, columns = places // dense.shape[3], places % dense.shape[3]
    values = weight.flatten(1) @ masked_im2col(x, rows, columns, (3, 2), (1, 2))
    out = torch.zeros_like(dense)
    masked_col2im(values, rows, columns, out)
    there = torch.zeros(dense.shape[2:], dtype=torch.bool)
    there[rows, columns] = True
    assert_close("out", torch.where(there, dense, 0), out, 1e-12)


def test_batch_norm_in_steps_is_batch_norm():
    x, weight, bias = randn(3, 4, 5).float(), randn(4, seed=1).float(), randn(4, seed=2).float()
    leaves = [each.double().requires_grad_() for each in (x, weight, bias)]
    running = [torch.zeros(4, dtype=torch.double), torch.ones(4, dtype=torch.double)]
    wanted = F.batch_norm(leaves[0], *running, leaves[1], leaves[2], True, 0.3, 1e-5)
    mean = batch_norm.moments(x)
    variance = batch_norm.moments(x, mean)
    norm, deviation = batch_norm.normalized(x, mean, variance, 1e-5)
    assert_close("out", wanted, norm * weight.view(1, -1, 1) + bias.view(1, -1, 1), 1e-6)
    ours = [torch.zeros(4), torch.ones(4)]
    batch_norm.follow(ours[0], mean, 0.3)
    batch_norm.follow(ours[1], batch_norm.unbiased(variance, 15), 0.3)
    for right, found in zip(running, ours, strict=True):
        assert_close("running", right, found, 1e-6)
    grad = randn(3, 4, 5, seed=3).float()
    by_weight, by_bias = batch_norm.parameter_gradients(grad, norm)
    by_x = batch_norm.input_gradient(grad, weight, by_weight, by_bias, norm, deviation)
    for right, found in zip(
        torch.autograd.grad(wanted, leaves, grad.double()), (by_x, by_weight, by_bias), strict=True
    ):
        assert_close("gradient", right, found, 1e-5)


def resampled(x, kernel, rates, flip, gain):
    """Pixel by pixel."""
    images, channels, height, width = x.shape
    (ux, uy), (dx, dy), (left, right, top, bottom) = rates.up, rates.down, rates.padding
    kernel = kernel if kernel.dim() == 2 else torch.outer(kernel, kernel)
    kernel = kernel if flip else kernel.flip(0, 1)
    fh, fw = kernel.shape
    rows = range(0, height * uy + top + bottom - fh + 1, dy)
    columns = range(0, width * ux + left + right - fw + 1, dx)
    out = x.new_zeros((images, channels, len(rows), len(columns)))
    for p, i in enumerate(rows):
        for q, j in enumerate(columns):
            for a in range(fh):
                for b in range(fw):
                    v, u = i + a - top, j + b - left
                    if v % uy == 0 and u % ux == 0 and 0 <= v < height * uy and 0 <= u < width * ux:
                        out[:, :, p, q] = out[:, :, p, q] + gain * kernel[a, b] * x[:, :, v // uy, u // ux]
    return out


RATES = [Rates(), Rates((2, 1), (1, 2), (1, 2, 3, 0)), Rates((3, 2), (2, 3), (2, -1, -2, 4))]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("rates", RATES)
def test_upfirdn2d(rates, separable, flip):
    x, kernel = randn(2, 3, 4, 5).requires_grad_(), randn(3, seed=1) if separable else randn(2, 3, seed=1)
    found = upfirdn2d(x, kernel, rates, flip=flip, gain=1.7)
    agrees(found, resampled(x, kernel, rates, flip, 1.7), (x,))


def test_upfirdn2d_refuses_a_kernel_larger_than_the_image():
    with pytest.raises(ValueError, match="is larger than"):
        upfirdn2d(torch.zeros(1, 1, 2, 2), torch.zeros(3, 3), Rates())


def test_filtered_leaky_relu_and_its_gradient_by_signs():
    x, bias = randn(2, 3, 5, 4).requires_grad_(), randn(3, seed=1)
    up, down = randn(4, seed=2), randn(3, 3, seed=3)
    rates = Rates((2, 2), (2, 2), (3, 2, 1, 3))
    how = {"gain": 1.3, "slope": 0.2, "clamp": 0.8}
    raised = resampled(x + bias.view(-1, 1, 1), up, Rates((2, 2), (1, 1), rates.padding), False, 4.0)
    # Zeros of the margins count as positive, which F.leaky_relu's gradient does not.
    active = torch.where(raised < 0, 0.2 * 1.3 * raised, 1.3 * raised).clamp(-0.8, 0.8)
    wanted = resampled(active, down, Rates((1, 1), (2, 2)), False, 1.0)
    found, signs = filtered_leaky_relu(x, up, down, bias, rates, **how)
    agrees(found, wanted, (x,))
    assert signs.shape == raised.shape
    # The slope that the signs remember is that of the activation, at any window of them.
    (slopes,) = torch.autograd.grad(active.sum(), raised, retain_graph=True)
    ones = torch.ones_like(raised)[:, :, 2:, 1:]
    by_signs, _ = leaky_relu_by_signs(ones, signs, (1, 2), gain=1.3, slope=0.2, clamp=math.inf)
    assert_close("slopes", slopes[:, :, 2:, 1:], by_signs, 1e-12)
    outside, _ = leaky_relu_by_signs(torch.ones(2, 3, 1, 1), signs, (-1, -1), gain=1.3, slope=0.2, clamp=math.inf)
    assert_close("outside", torch.full((2, 3, 1, 1), 1.3), outside, 1e-7)


FUNCTIONS = {
    "linear": lambda x, a: x,
    "relu": lambda x, a: torch.where(x > 0, x, 0 * x),
    "lrelu": lambda x, a: torch.where(x > 0, x, a * x),
    "tanh": lambda x, a: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x, a: 1 / (1 + (-x).exp()),
    "elu": lambda x, a: torch.where(x > 0, x, x.exp() - 1),
    "selu": lambda x, a: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
    "softplus": lambda x, a: (1 + x.exp()).log(),
    "swish": lambda x, a: x / (1 + (-x).exp()),
}


@pytest.mark.parametrize("clamp", [None, 0.9])
@pytest.mark.parametrize("act", FUNCTIONS)
def test_activations_and_two_derivatives(act, clamp):
    x, bias = randn(2, 3, 4).requires_grad_(), randn(3, seed=1)
    how = {"dim": 1, "act": act, "alpha": 0.3, "gain": 1.7, "clamp": clamp}
    wanted = FUNCTIONS[act](x + bias.view(-1, 1), 0.3) * 1.7
    wanted = wanted if clamp is None else wanted.clamp(-clamp, clamp)
    found = bias_act(x, bias, **how)
    assert_close("out", wanted, found, 1e-12)
    (first,) = torch.autograd.grad(wanted.sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    y = found.detach()
    for order, right in ((1, first), (2, second)):
        with_x = bias_act_derivative(order, x.detach(), None if act == "swish" else y, bias, **how)
        assert_close(f"derivative {order}", right, with_x, 1e-11)
    if act in ("relu", "lrelu", "linear"):
        assert_close("from y", first, bias_act_derivative(1, None, y, None, **how), 1e-12)


def test_activations_that_are_not_known_are_refused():
    assert set(ACTIVATIONS) == set(FUNCTIONS)
    with pytest.raises(ValueError, match="no activation 'gelu'"):
        bias_act(torch.zeros(1), act="gelu")
    with pytest.raises(ValueError, match="bias is"):
        bias_act(torch.zeros(1, 2), torch.zeros(3))


def test_autocast_narrows_no_sums():
    x, kernel, beziers = randn(1, 4, 6, 7).float(), randn(3, 3, seed=1).float(), torch.rand(2, 17, generator=rng(2))
    beziers[:, 0] = 0
    offset, weight = torch.zeros(1, 18, 4, 5), randn(2, 4, 3, 3, seed=3).float()
    ops = (
        lambda: upfirdn2d(x, kernel, Rates()),
        lambda: correlation(x, x, Patches((3, 3), (3, 3))),
        lambda: bezier_align(x, beziers * 6, (2, 2)),
        lambda: deform_conv2d(x, offset, weight),
    )
    for op in ops:
        wanted = op()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(), wanted)
