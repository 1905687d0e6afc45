"""Deformable convolution, plain (arXiv 1703.06211) and modulated (1811.11168): bilinear columns, then a product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision, wide
from .rois import FLOATS
from .taps import gather, padded_corners, regular, scatter

COLUMNS_AT_ONCE = 1 << 26  # float32, 256 MB


@dataclass(frozen=True)
class Window:
    """How a kernel goes over an image; everything ``(y, x)``."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    window: Window | None = None,
) -> Tensor:
    """Convolution whose kernel elements read where an offset says, interpolated, with zeros around the image.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        offset: ``(N, D * K * 2, H', W')`` in pixels, for each of ``D`` groups of channels and ``K`` kernel elements y
            before x.
        weight: ``(C', C / groups, kernel height, kernel width)``.
        bias: ``(C',)``.
        mask: ``(N, D * K, H', W')`` a factor of each element that is read; None for 1.
        window: stride, padding, dilation, groups and ``D``; :class:`Window` () when None.

    Returns:
        ``(N, C', H', W')``, dtype of ``x``. Differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    window = window or Window()
    _check(x, offset, weight, bias, mask, window)
    out: Tensor = _DeformConv.apply(x, offset, weight, bias, mask, window)  # type: ignore[no-untyped-call]
    return out


def deform_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    window: Window,
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x``, ``offset``, ``weight`` and ``mask``, as far as wanted, from that of :func:`deform_conv2d`.

    That of the bias is the sum of ``grad`` over images and places. Columns are computed again, not kept.
    """
    dtype = wide(x)
    places = _Places(x, offset, weight, mask, window)
    matrix = _matrix(weight.to(dtype), window.groups)
    grad_x, grad_offset, grad_mask = (
        torch.zeros_like(each, dtype=dtype, memory_format=torch.contiguous_format)
        if need and each is not None
        else None
        for each, need in ((x, wanted[0]), (offset, wanted[1]), (mask, wanted[3]))
    )
    grad_matrix = torch.zeros_like(matrix) if wanted[2] else None
    moves = grad_offset is not None or grad_mask is not None
    for images, rows in places.parts():
        g = grad[images, :, rows].to(dtype).permute(0, 2, 3, 1).unflatten(3, (window.groups, -1))
        g = g.flatten(0, 2).transpose(0, 1)  # groups, places, channels
        offsets, masks = places.of(images, rows)
        with torch.enable_grad():
            offsets.requires_grad_(grad_offset is not None)
            if masks is not None:
                masks.requires_grad_(grad_mask is not None)
            maps = places.maps(images)
            taps = regular(*places.corners(offsets, masks, images, rows))
            columns = gather(maps, [taps]) if moves or grad_matrix is not None else maps[:0]
        if grad_matrix is not None:
            with full_precision(x):
                grad_matrix += torch.bmm(_by_group(columns.detach(), places, window).transpose(1, 2), g)
        if grad_x is None and not moves:
            continue
        with full_precision(x):
            grad_columns = torch.bmm(g, matrix.transpose(1, 2))  # groups, places, kernel * channels
        grad_columns = grad_columns.unflatten(2, (places.kernel, -1)).permute(1, 2, 0, 3)
        grad_columns = grad_columns.reshape(-1, maps.shape[1])
        if grad_x is not None:
            found = scatter(grad_columns, [taps], maps.shape)
            grad_x[images] += found.reshape(grad_x[images].shape)
        if moves:
            leaves = [each for each in (offsets, masks) if each is not None and each.requires_grad]
            found_all = iter(torch.autograd.grad(columns, leaves, grad_columns))
            if grad_offset is not None:
                places.layout(grad_offset, 2)[images, rows] = next(found_all)
            if grad_mask is not None:
                places.layout(grad_mask, 1)[images, rows] = next(found_all).unsqueeze(-1)
    grad_weight = None if grad_matrix is None else _unmatrix(grad_matrix, weight)
    results = ((grad_x, x), (grad_offset, offset), (grad_weight, weight), (grad_mask, mask))
    first, second, third, fourth = (
        None if found is None or like is None else found.to(like.dtype) for found, like in results
    )
    return first, second, third, fourth


def output_size(x: Tensor, weight: Tensor, window: Window) -> tuple[int, int]:
    """``(H', W')``; 0 or less where the kernel is larger than the padded image."""
    high, broad = (
        (x.shape[2 + i] + 2 * window.padding[i] - window.dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // window.stride[i]
        + 1
        for i in (0, 1)
    )
    return high, broad


class _DeformConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, window: Window
    ) -> Tensor:
        ctx.save_for_backward(x, offset, weight, mask)
        ctx.window, ctx.bias_dtype = window, None if bias is None else bias.dtype
        return _forward(x, offset, weight, bias, mask, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, weight, mask = ctx.saved_tensors
        need_x, need_offset, need_weight, need_bias, need_mask, _ = ctx.needs_input_grad
        wanted = (need_x, need_offset, need_weight, need_mask)
        grad_x, grad_offset, grad_weight, grad_mask = deform_conv2d_backward(
            grad, x, offset, weight, mask, ctx.window, wanted
        )
        grad_bias = grad.sum((0, 2, 3), dtype=wide(grad)).to(ctx.bias_dtype) if need_bias else None
        return grad_x, grad_offset, grad_weight, grad_bias, grad_mask, None


def _forward(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, window: Window
) -> Tensor:
    dtype = wide(x)
    places = _Places(x, offset, weight, mask, window)
    matrix = _matrix(weight.to(dtype), window.groups)
    out = x.new_empty((len(x), weight.shape[0], *places.size))
    for images, rows in places.parts():
        taps = regular(*places.corners(*places.of(images, rows), images, rows))
        columns = _by_group(gather(places.maps(images), [taps]), places, window)
        with full_precision(x):
            found = torch.bmm(columns, matrix).transpose(0, 1).flatten(1)
        if bias is not None:
            found += bias.to(dtype)
        target = out[images, :, rows]
        target.copy_(found.view(len(target), *target.shape[2:], -1).permute(0, 3, 1, 2))
    return out


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """``(groups, kernel * C / groups, C' / groups)``, kernel elements before channels."""
    matrix: Tensor = weight.unflatten(0, (groups, -1)).flatten(3).permute(0, 3, 2, 1).flatten(1, 2)
    return matrix


def _unmatrix(matrix: Tensor, weight: Tensor) -> Tensor:
    kernel = weight.shape[2] * weight.shape[3]
    found: Tensor = matrix.unflatten(1, (kernel, -1)).permute(0, 3, 2, 1).reshape(weight.shape)
    return found


def _by_group(columns: Tensor, places: _Places, window: Window) -> Tensor:
    """Columns ``(places * kernel * D, C / D)`` as ``(groups, places, kernel * C / groups)``."""
    by_place = columns.view(-1, places.kernel, window.groups, places.channels // window.groups)
    return by_place.permute(2, 0, 1, 3).flatten(2)


class _Places:
    """Where each kernel element of each output reads."""

    def __init__(self, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, window: Window) -> None:
        self.x, self.offset, self.mask, self.window = x, offset, mask, window
        self.dtype, self.channels = wide(x), x.shape[1]
        self.kernel_size = (weight.shape[2], weight.shape[3])
        self.kernel = weight.shape[2] * weight.shape[3]
        self.size = output_size(x, weight, window)

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Images, and rows of the output, that are computed together."""
        high, broad = self.size
        of_a_row = max(1, broad * self.kernel * max(self.channels, 4 * self.window.deform_groups))
        images = max(1, COLUMNS_AT_ONCE // (of_a_row * high))
        rows = min(high, max(1, COLUMNS_AT_ONCE // of_a_row))
        for image in range(0, len(self.x), images):
            for row in range(0, high, rows):
                yield slice(image, min(image + images, len(self.x))), slice(row, min(row + rows, high))

    def layout(self, values: Tensor, parts: int) -> Tensor:
        """``(N, D * K * parts, H', W')`` seen as ``(N, H', W', K, D, parts)``."""
        split: Tensor = values.unflatten(1, (self.window.deform_groups, self.kernel, parts))
        return split.permute(0, 4, 5, 2, 1, 3)

    def of(self, images: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Offsets ``(n, h, W', K, D, 2)`` and masks ``(n, h, W', K, D)``, contiguous and detached."""
        offset = self.layout(self.offset.detach(), 2)[images, rows].to(self.dtype).contiguous()
        if self.mask is None:
            return offset, None
        mask = self.layout(self.mask.detach(), 1)[images, rows].to(self.dtype)
        return offset, mask.squeeze(-1).contiguous()

    def maps(self, images: slice) -> Tensor:
        """Feature maps of each group of channels that moves together, ``(n * D, C / D, H, W)``."""
        maps: Tensor = self.x[images].detach().unflatten(1, (self.window.deform_groups, -1)).flatten(0, 1)
        return maps

    def corners(self, offset: Tensor, mask: Tensor | None, images: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Pixels and weights, ``(n * h * W' * K * D, 4)``."""
        window, device = self.window, offset.device
        high, broad = self.kernel_size
        count, groups = offset.shape[0], window.deform_groups
        row = torch.arange(rows.start, rows.stop, device=device) * window.stride[0] - window.padding[0]
        column = torch.arange(offset.shape[2], device=device) * window.stride[1] - window.padding[1]
        tap_row = (torch.arange(high, device=device) * window.dilation[0]).repeat_interleave(broad)
        tap_column = (torch.arange(broad, device=device) * window.dilation[1]).repeat(high)
        y = offset[..., 0] + (row.view(-1, 1, 1, 1) + tap_row.view(-1, 1)).to(offset.dtype)
        x = offset[..., 1] + (column.view(-1, 1, 1) + tap_column.view(-1, 1)).to(offset.dtype)
        maps = torch.arange(count * groups, device=device).view(count, 1, 1, 1, groups).expand_as(y)
        shape = (count * groups, self.channels // groups, *self.x.shape[2:])
        pixels, weights = padded_corners(maps.flatten(), y.flatten(), x.flatten(), shape)
        return pixels, weights if mask is None else weights * mask.reshape(-1, 1)


def _check(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, window: Window) -> None:
    if x.dtype not in FLOATS or x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and weight {tuple(weight.shape)}, expected floating point, both 4-D"
        )
    channels, groups, moved = x.shape[1], window.groups, window.deform_groups
    if min(groups, moved, *window.stride, *window.dilation) < 1 or min(window.padding) < 0:
        raise ValueError(f"{window}: expected strides, dilations and groups from 1, padding from 0")
    if channels % groups or channels % moved or weight.shape[0] % groups or weight.shape[1] * groups != channels:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, with {groups} groups and {moved} for offsets; x has {channels} channels"
        )
    size = output_size(x, weight, window)
    if min(size) < 1 or 0 in x.shape[2:]:
        raise ValueError(f"x is {tuple(x.shape)}: the output would be {size}")
    kernel = weight.shape[2] * weight.shape[3]
    for name, tensor, shape in (
        ("offset", offset, (len(x), moved * kernel * 2, *size)),
        ("mask", mask, (len(x), moved * kernel, *size)),
        ("bias", bias, (weight.shape[0],)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
    for name, tensor in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
