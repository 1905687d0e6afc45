"""CARAFE (arXiv 1905.02188): upsampling with a kernel of its own for every pixel of the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import wide


def carafe(x: Tensor, masks: Tensor, kernel_size: int, groups: int = 1, scale: int = 1) -> Tensor:
    """Each pixel of the result is a weighted sum over the window around the pixel of ``x`` that it lies on.

    Args:
        x: ``(N, C, H, W)`` floating point, zero outside. Sums are in float32 at least.
        masks: ``(N, groups * kernel_size^2, scale * H, scale * W)``, a kernel for each group of channels.
        kernel_size: odd.
        scale: how many pixels of the result lie on one of ``x``, along each axis.

    Returns:
        ``(N, C, scale * H, scale * W)``, dtype of ``x``. Differentiable in ``x`` and ``masks``.

    Raises:
        ValueError: a shape or device is wrong.
    """
    _check(x, masks, kernel_size, groups, scale)
    out: Tensor = _Carafe.apply(x, masks, kernel_size, groups, scale)  # type: ignore[no-untyped-call]
    return out


def carafe_backward(
    grad: Tensor, x: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``masks`` from that of :func:`carafe`."""
    _check(x, masks, kernel_size, groups, scale)
    dtype = wide(x)
    padded, kernels = _split(x.to(dtype), masks.to(dtype), kernel_size, groups, scale)
    grads = _apart(grad.to(dtype).unflatten(1, (groups, -1)), scale)
    by_padded, by_kernels = torch.zeros_like(padded), torch.zeros_like(kernels)
    for tap, window in _windows(kernel_size, x.shape):
        by_kernels[:, :, tap] = (grads * padded[window]).sum(2)
        target = by_padded[window][:, :, :, 0, 0]
        for row in range(scale):
            for column in range(scale):
                target.addcmul_(grads[:, :, :, row, column], kernels[:, :, tap, row, column].unsqueeze(2))
    margin = kernel_size // 2
    by_x = by_padded[..., margin : margin + x.shape[2], margin : margin + x.shape[3]].reshape(x.shape)
    return by_x.to(x.dtype), _together(by_kernels).reshape(masks.shape).to(masks.dtype)


class _Carafe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int) -> Tensor:
        ctx.save_for_backward(x, masks)
        ctx.sizes = kernel_size, groups, scale
        dtype = wide(x)
        padded, kernels = _split(x.to(dtype), masks.to(dtype), kernel_size, groups, scale)
        split = (len(x), groups, x.shape[1] // groups, scale, scale, *x.shape[2:])
        out = x.new_zeros(split, dtype=dtype)
        for tap, window in _windows(kernel_size, x.shape):
            out.addcmul_(padded[window], kernels[:, :, tap].unsqueeze(2))
        return _together(out).flatten(1, 2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *carafe_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _split(x: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    """``x`` with its margins, ``(N, G, C / G, 1, 1, H + k - 1, W + k - 1)``, and kernels, taken :func:`_apart`."""
    padded = F.pad(x, (kernel_size // 2,) * 4).unflatten(1, (groups, -1, 1, 1))
    return padded, _apart(masks.unflatten(1, (groups, kernel_size**2)), scale)


def _apart(maps: Tensor, scale: int) -> Tensor:
    """``(..., scale * H, scale * W)`` as contiguous ``(..., scale, scale, H, W)``: whole rows make fast loops."""
    split: Tensor = maps.unflatten(-1, (-1, scale)).unflatten(-3, (-1, scale))
    return split.movedim((-3, -1), (-4, -3)).contiguous()


def _together(maps: Tensor) -> Tensor:
    """The way back."""
    return maps.movedim((-4, -3), (-3, -1)).flatten(-4, -3).flatten(-2)


def _windows(kernel_size: int, shape: torch.Size) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for tap in range(kernel_size**2):
        row, column = divmod(tap, kernel_size)
        yield tap, (..., slice(row, row + shape[2]), slice(column, column + shape[3]))


def _check(x: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int) -> None:
    if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (N, C, H, W), not empty but for N")
    if kernel_size < 1 or kernel_size % 2 == 0 or scale < 1 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"kernel_size {kernel_size} (odd), scale {scale}, {groups} groups of {x.shape[1]} channels")
    shape = (len(x), groups * kernel_size**2, scale * x.shape[2], scale * x.shape[3])
    if tuple(masks.shape) != shape or masks.device != x.device:
        raise ValueError(f"masks is {tuple(masks.shape)} on {masks.device}, expected {shape} on {x.device}")
