"""Upsampling, filtering and downsampling of images in one (upfirdn)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision, wide


@dataclass(frozen=True)
class Rates:
    """Zeros between pixels and pixels left out, both ``(x, y)``; margins ``(x before, x after, y before, y after)``."""

    up: tuple[int, int] = (1, 1)
    down: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)


def upfirdn2d(x: Tensor, kernel: Tensor, rates: Rates, *, flip: bool = False, gain: float = 1.0) -> Tensor:
    """``up - 1`` zeros behind each pixel, margins added or, if negative, cut, a filter, every ``down``-th pixel kept.

    Args:
        x: ``(N, C, H, W)`` floating point. Sums are in float32 at least.
        kernel: ``(fh, fw)``, the same for all channels; ``(f,)`` for one that is separable into twice the same.
        flip: correlation instead of convolution.
        gain: factor of the result.

    Returns:
        ``(N, C, H', W')``, dtype of ``x``. Differentiable in ``x``.

    Raises:
        ValueError: a shape or device is wrong, or the kernel is larger than the image with its margins.
    """
    if x.dim() != 4 or not x.is_floating_point() or kernel.dim() not in (1, 2) or 0 in kernel.shape:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, the kernel {tuple(kernel.shape)}")
    if min(*rates.up, *rates.down) < 1 or kernel.device != x.device:
        raise ValueError(f"{rates} on {x.device}, the kernel on {kernel.device}")
    images, channels, height, width = x.shape
    (up_x, up_y), (left, right, top, bottom) = rates.up, rates.padding
    size = (height * up_y + top + bottom, width * up_x + left + right)
    if size[0] < kernel.shape[0] or size[1] < kernel.shape[-1]:
        raise ValueError(f"the kernel {tuple(kernel.shape)} is larger than the image with its margins, {size}")
    values = x.to(wide(x)).reshape(images * channels, 1, height, 1, width, 1)
    values = F.pad(values, (0, up_x - 1, 0, 0, 0, up_y - 1)).reshape(-1, 1, height * up_y, width * up_x)
    values = F.pad(values, (left, right, top, bottom))
    taps = kernel.to(values.dtype) if flip else kernel.to(values.dtype).flip(tuple(range(kernel.dim())))
    step_x, step_y = rates.down
    with full_precision(x):
        if taps.dim() == 2:
            values = F.conv2d(values, (taps * gain)[None, None], stride=(step_y, step_x))
        else:
            values = F.conv2d(values, taps[None, None, None], stride=(1, step_x))
            values = F.conv2d(values, (taps * gain)[None, None, :, None], stride=(step_y, 1))
    return values.view(images, channels, *values.shape[2:]).to(x.dtype)


def filtered_leaky_relu(
    x: Tensor,
    up_kernel: Tensor,
    down_kernel: Tensor,
    bias: Tensor,
    rates: Rates,
    signs: Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
    *,
    gain: float,
    slope: float,
    clamp: float,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bias, upsampling, leaky ReLU and downsampling (StyleGAN3, arXiv 2106.12423).

    Args:
        x: ``(N, C, H, W)``.
        up_kernel, down_kernel: as for :func:`upfirdn2d`.
        bias: ``(C,)``.
        rates: ``up[0]`` and ``down[0]`` count, for both axes.
        signs, offset, gain, slope, clamp: as for :func:`leaky_relu_by_signs`.

    Returns:
        The result, dtype of ``x``, and the signs.
    """
    up, down = rates.up[0], rates.down[0]
    dtype = wide(x)
    raised = upfirdn2d(
        x.to(dtype) + bias.to(dtype).view(-1, 1, 1),
        up_kernel,
        Rates((up, up), (1, 1), rates.padding),
        flip=flip,
        gain=float(up**2),
    )
    active, found = leaky_relu_by_signs(raised, signs, offset, gain=gain, slope=slope, clamp=clamp)
    return upfirdn2d(active, down_kernel, Rates((1, 1), (down, down)), flip=flip).to(x.dtype), found


def leaky_relu_by_signs(
    x: Tensor, signs: Tensor | None, offset: tuple[int, int] = (0, 0), *, gain: float, slope: float, clamp: float
) -> tuple[Tensor, Tensor]:
    """A clamped leaky ReLU that remembers what it did, or does the same to a gradient.

    Args:
        x: ``(N, C, H, W)``.
        signs: None, or uint8 ``(N, C, H', W')`` of a call before: bit 0 where ``slope`` applies, bit 1 where the result
            is zero.
        offset: x and y of the first pixel of ``x`` in ``signs``; outside of them neither applies.
        gain: factor before everything.
        clamp: largest magnitude; infinity for none.

    Returns:
        The result, dtype of ``x``, and the signs, new ones where none were given.
    """
    values = x.to(wide(x)) * gain
    if signs is None:
        negative = values < 0
        values = torch.where(negative, values * slope, values)
        beyond = values.abs() > clamp
        found = negative.to(torch.uint8) | beyond.to(torch.uint8) << 1
        return values.clamp(-clamp, clamp).to(x.dtype), found
    height, width = x.shape[2:]
    left, top = offset
    window = F.pad(signs, (-left, left + width - signs.shape[3], -top, top + height - signs.shape[2]))
    values = torch.where((window & 1).bool(), values * slope, values)
    return torch.where((window & 2).bool(), 0, values).to(x.dtype), signs
