"""Correlation of two images over a range of displacements (FlowNet, arXiv 1504.06852)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision, wide


@dataclass(frozen=True)
class Patches:
    """What is compared with what; everything ``(y, x)``.

    Attributes:
        kernel: the window whose products are summed.
        patch: how many displacements along each axis, centred.
        patch_dilation: pixels from one displacement to the next.
    """

    kernel: tuple[int, int] = (1, 1)
    patch: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    patch_dilation: tuple[int, int] = (1, 1)


def correlation(first: Tensor, second: Tensor, patches: Patches) -> Tensor:
    """Sums over channels and a window of products of ``first`` and a displaced ``second``.

    Args:
        first, second: ``(N, C, H, W)`` floating point, zero outside. Sums are in float32 at least.

    Returns:
        ``(N, patch height, patch width, H', W')``, dtype of ``first``. Differentiable in both.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the window is larger than the padded image.
    """
    _check(first, second, patches)
    out: Tensor = _Correlation.apply(first, second, patches)  # type: ignore[no-untyped-call]
    return out


def correlation_backward(grad: Tensor, first: Tensor, second: Tensor, patches: Patches) -> tuple[Tensor, Tensor]:
    """Gradients of both images from that of :func:`correlation`."""
    _check(first, second, patches)
    dtype = wide(first)
    a, b = first.to(dtype), second.to(dtype)
    by_a, by_b = torch.zeros_like(a), torch.zeros_like(b)
    window = a.new_ones((1, 1, *patches.kernel))
    for (p, q), here, there in _displacements(patches, first.shape):
        # What each product of two pixels counts: the windows that it is in.
        every = _spread(grad[:, p, q].unsqueeze(1).to(dtype), window, patches, first.shape)
        by_a[here] += every[here] * b[there]
        by_b[there] += every[here] * a[here]
    return by_a.to(first.dtype), by_b.to(second.dtype)


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, patches: Patches) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.patches = patches
        dtype = wide(first)
        a, b = first.to(dtype), second.to(dtype)
        window = a.new_ones((1, 1, *patches.kernel))
        out = first.new_empty((len(first), *patches.patch, *_size(patches, first.shape)))
        for (p, q), here, there in _displacements(patches, first.shape):
            products = a.new_zeros((len(a), 1, *a.shape[2:]))
            products[here] = (a[here] * b[there]).sum(1, keepdim=True)
            with full_precision(a):
                sums = F.conv2d(
                    products, window, stride=patches.stride, padding=patches.padding, dilation=patches.dilation
                )
            out[:, p, q] = sums.squeeze(1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        first, second = ctx.saved_tensors
        return *correlation_backward(grad, first, second, ctx.patches), None


def _displacements(
    patches: Patches, shape: torch.Size
) -> Iterator[tuple[tuple[int, int], tuple[Any, ...], tuple[Any, ...]]]:
    """Each displacement, and the parts of the first and the second image that it lays over each other."""
    for p in range(patches.patch[0]):
        for q in range(patches.patch[1]):
            here, there = [], []
            for axis, number in enumerate((p, q)):
                size = shape[2 + axis]
                moved = (
                    number * patches.patch_dilation[axis]
                    - patches.patch_dilation[axis] * (patches.patch[axis] - 1) // 2
                )
                low, high = min(size, max(0, -moved)), max(0, min(size, size - moved))
                high = max(low, high)
                here.append(slice(low, high))
                there.append(slice(max(0, low + moved), max(0, high + moved)))
            yield (p, q), (..., *here), (..., *there)


def _spread(grad: Tensor, window: Tensor, patches: Patches, shape: torch.Size) -> Tensor:
    """The convolution with ``window``, transposed, ``(N, 1, H, W)``."""
    # Rows and columns that no window reached are not in the sum that comes back.
    left_over = [
        shape[2 + i] + 2 * patches.padding[i] - patches.dilation[i] * (patches.kernel[i] - 1) - 1
        - (grad.shape[2 + i] - 1) * patches.stride[i]
        for i in (0, 1)
    ]  # fmt: skip
    with full_precision(grad):
        return F.conv_transpose2d(
            grad,
            window,
            stride=patches.stride,
            padding=patches.padding,
            output_padding=left_over,
            dilation=patches.dilation,
        )


def _size(patches: Patches, shape: torch.Size) -> tuple[int, int]:
    high, broad = (
        (shape[2 + i] + 2 * patches.padding[i] - patches.dilation[i] * (patches.kernel[i] - 1) - 1) // patches.stride[i]
        + 1
        for i in (0, 1)
    )
    return high, broad


def _check(first: Tensor, second: Tensor, patches: Patches) -> None:
    if first.dim() != 4 or not first.is_floating_point() or 0 in first.shape[2:]:
        raise ValueError(f"expected floating point (N, C, H, W), got {first.dtype} {tuple(first.shape)}")
    if second.shape != first.shape or second.dtype != first.dtype or second.device != first.device:
        raise ValueError(
            f"the second image is {second.dtype} {tuple(second.shape)} on {second.device}, "
            f"the first {first.dtype} {tuple(first.shape)} on {first.device}"
        )
    counts = (*patches.kernel, *patches.patch, *patches.stride, *patches.dilation, *patches.patch_dilation)
    if min(counts) < 1 or min(patches.padding) < 0:
        raise ValueError(f"{patches}: expected padding from 0, everything else from 1")
    if min(_size(patches, first.shape)) < 1:
        raise ValueError(f"{patches} does not fit images of {tuple(first.shape[2:])}")
