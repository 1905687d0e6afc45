"""Other ops on feature maps: correlation, aligned and masked features, turned filters, resampling, activations."""

from __future__ import annotations

from torch import Tensor

import kernelgraft_core.vision.rotated_feature_align as feature_align
import kernelgraft_core.vision.rotated_filters as rotated_filters
from kernelgraft_core.vision import masked_columns
from kernelgraft_core.vision.bias_act import ACTIVATIONS, bias_act_derivative
from kernelgraft_core.vision.bias_act import bias_act as biased
from kernelgraft_core.vision.correlation import Patches, correlation
from kernelgraft_core.vision.correlation import correlation_backward as correlation_gradients
from kernelgraft_core.vision.resample import Rates, filtered_leaky_relu, leaky_relu_by_signs
from kernelgraft_core.vision.resample import upfirdn2d as resampled
from kernelgraft_core.vision.temporal_shift import temporal_shift

__all__ = (
    "active_rotated_filter_backward",
    "active_rotated_filter_forward",
    "bias_act",
    "correlation_backward",
    "correlation_forward",
    "filtered_lrelu",
    "filtered_lrelu_act_",
    "fused_bias_leakyrelu",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "rotated_feature_align_backward",
    "rotated_feature_align_forward",
    "tin_shift_backward",
    "tin_shift_forward",
    "upfirdn2d",
)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    sizes = (kernel_h, kernel_w), (pad_h, pad_w)
    col.copy_(masked_columns.masked_im2col(im, mask_h_idx, mask_w_idx, *sizes))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    masked_columns.masked_col2im(col, mask_h_idx, mask_w_idx, im)


def tin_shift_forward(input: Tensor, shift: Tensor, output: Tensor) -> None:
    output.copy_(temporal_shift(input, shift))


def tin_shift_backward(grad_output: Tensor, shift: Tensor, grad_input: Tensor) -> None:
    """Moved back. The compiled op moves the gradient forward a second time, which is not the derivative."""
    grad_input.copy_(temporal_shift(grad_output, -shift))


def rotated_feature_align_forward(
    features: Tensor, best_bboxes: Tensor, output: Tensor, spatial_scale: float, points: int
) -> None:
    output.copy_(feature_align.rotated_feature_align(features, best_bboxes, spatial_scale, points))


def rotated_feature_align_backward(
    top_grad: Tensor, best_bboxes: Tensor, bottom_grad: Tensor, spatial_scale: float, points: int
) -> None:
    bottom_grad.copy_(feature_align.rotated_feature_align_backward(top_grad, best_bboxes, spatial_scale, points))


def active_rotated_filter_forward(input: Tensor, indices: Tensor, output: Tensor) -> None:
    output.copy_(rotated_filters.active_rotated_filter(input, indices))


def active_rotated_filter_backward(grad_out: Tensor, indices: Tensor, grad_in: Tensor) -> None:
    grad_in.copy_(rotated_filters.active_rotated_filter_backward(grad_out, indices, grad_in.shape))


def correlation_forward(input1: Tensor, input2: Tensor, output: Tensor, **how: int) -> None:
    output.copy_(correlation(input1, input2, _patches(**how)))


def correlation_backward(
    grad_output: Tensor, input1: Tensor, input2: Tensor, grad_input1: Tensor, grad_input2: Tensor, **how: int
) -> None:
    found = correlation_gradients(grad_output, input1, input2, _patches(**how))
    grad_input1.copy_(found[0])
    grad_input2.copy_(found[1])


def _patches(
    kH: int,
    kW: int,
    patchH: int,
    patchW: int,
    padH: int,
    padW: int,
    dilationH: int,
    dilationW: int,
    dilation_patchH: int,
    dilation_patchW: int,
    dH: int,
    dW: int,
) -> Patches:
    return Patches(
        (kH, kW), (patchH, patchW), (dH, dW), (padH, padW), (dilationH, dilationW), (dilation_patchH, dilation_patchW)
    )


def upfirdn2d(
    input: Tensor,
    filter: Tensor,
    upx: int,
    upy: int,
    downx: int,
    downy: int,
    padx0: int,
    padx1: int,
    pady0: int,
    pady1: int,
    flip: bool,
    gain: float,
) -> Tensor:
    rates = Rates((upx, upy), (downx, downy), (padx0, padx1, pady0, pady1))
    return resampled(input, filter, rates, flip=flip, gain=gain)


def filtered_lrelu(
    input: Tensor,
    filter_up: Tensor,
    filter_down: Tensor,
    bias: Tensor,
    signs: Tensor,
    up: int,
    down: int,
    px0: int,
    px1: int,
    py0: int,
    py1: int,
    sx: int,
    sy: int,
    gain: float,
    slope: float,
    clamp: float,
    flip_filter: bool,
    write_signs: bool,
) -> tuple[Tensor, Tensor, int]:
    """The last number tells mmcv that nothing is left to do; the signs are read by nobody but this module."""
    out, found = filtered_leaky_relu(
        input,
        filter_up,
        filter_down,
        bias,
        Rates((up, up), (down, down), (px0, px1, py0, py1)),
        signs if signs.numel() else None,
        (sx, sy),
        gain=gain,
        slope=slope,
        clamp=clamp,
        flip=flip_filter,
    )
    return out, found if write_signs else signs, 0


def filtered_lrelu_act_(
    input: Tensor, signs: Tensor, sx: int, sy: int, gain: float, slope: float, clamp: float, write_signs: bool
) -> Tensor:
    given = signs if signs.numel() else None
    out, found = leaky_relu_by_signs(input, given, (sx, sy), gain=gain, slope=slope, clamp=clamp)
    input.copy_(out)
    return found if write_signs else signs


def fused_bias_leakyrelu(
    input: Tensor, bias: Tensor, refer: Tensor, act: int, grad: int, alpha: float, scale: float
) -> Tensor:
    """mmcv asks for the leaky ReLU alone, ``act`` 3, and for its value or its first derivative, ``grad`` 0 or 1."""
    given = bias if bias.numel() else None
    if grad == 0:
        return biased(input, given, 1, "lrelu", alpha, scale)
    slopes = bias_act_derivative(1, None, refer, None, 1, "lrelu", alpha, scale)
    assert slopes is not None
    return (biased(input, given).to(slopes.dtype) * slopes).to(input.dtype)


def bias_act(
    input: Tensor,
    bias: Tensor,
    xref: Tensor,
    yref: Tensor,
    dy: Tensor,
    grad: int,
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """``act`` counts mmcv's activation functions from 1; a negative ``clamp`` is none."""
    name, largest = tuple(ACTIVATIONS)[act - 1], clamp if clamp >= 0 else None
    offset, x, y, factor = (each if each.numel() else None for each in (bias, xref, yref, dy))
    if grad == 0:
        return biased(input, offset, dim, name, alpha, gain, largest)
    slopes = bias_act_derivative(grad, x, y, offset, dim, name, alpha, gain, largest)
    out = input * (gain if grad == 1 else 0) if slopes is None else input.to(slopes.dtype) * slopes
    return (out if factor is None else out * factor).to(input.dtype)
