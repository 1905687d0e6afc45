"""BorderAlign (BorderDet, arXiv 2007.11056): the largest sample along each border of a box."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import wide
from .rois import FLOATS
from .taps import Taps, bordered_corners, pixel_table, regular, scatter, weighted_rows


def border_align(x: Tensor, boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """The largest of ``pool_size + 1`` evenly spaced samples along each border, the first of equal ones.

    Args:
        x: ``(N, 4 * C, H, W)`` float16, bfloat16, float32 or float64: C channels for the top border, the left, the
            bottom and the right one.
        boxes: ``(N, B, 4)``, x1, y1, x2, y2 in pixels of ``x``; not differentiated.

    Returns:
        ``(N, C, B, 4)``, dtype of ``x``, and int32 numbers of the samples: from the upper left corner along the top and
        the left, from the lower right one along the bottom and the right. Not differentiable: see
        :func:`border_align_backward`.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    _check(x, boxes, x.shape, pool_size)
    images, channels = x.shape[0], x.shape[1] // 4
    maps = x.detach().unflatten(1, (4, channels)).flatten(0, 1)
    table = pixel_table(maps)
    best = table.new_zeros((images * 4 * boxes.shape[1], channels))
    number = torch.zeros(best.shape, dtype=torch.int32, device=x.device)
    for step, taps in enumerate(_samples(boxes.detach().to(best.dtype), maps.shape, pool_size)):
        found = weighted_rows(table, taps)
        if step == 0:
            best = found
        else:
            better = found > best
            best, number = torch.where(better, found, best), torch.where(better, step, number)
    out, first = (
        each.view(images, 4, boxes.shape[1], channels).permute(0, 3, 2, 1).contiguous() for each in (best, number)
    )
    return out.to(x.dtype), first


def border_align_backward(
    grad: Tensor, boxes: Tensor, number: Tensor, shape: torch.Size | tuple[int, ...], pool_size: int
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of the first result of :func:`border_align` and its second."""
    _check(grad, boxes, shape, pool_size)
    images, channels = shape[0], shape[1] // 4
    grads, steps = (
        each.permute(0, 3, 2, 1).reshape(images * 4 * boxes.shape[1], channels)
        for each in (grad.to(wide(grad)), number)
    )
    total = grads.new_zeros((images * 4, channels, *shape[2:]))
    for step, taps in enumerate(_samples(boxes.detach().to(grads.dtype), total.shape, pool_size)):
        total += scatter(torch.where(steps == step, grads, 0), [taps], total.shape)
    return total.view(tuple(shape)).to(grad.dtype)


def _lines(boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """Where each border begins and its step, ``(N, 4, B, 2)``, y first."""
    low, high = boxes[..., [1, 0]], boxes[..., [3, 2]]
    across, down = ((high - low) / pool_size * boxes.new_tensor(axis) for axis in ([0.0, 1.0], [1.0, 0.0]))
    return torch.stack((low, low, high, high), 1), torch.stack((across, down, -across, -down), 1)


def _samples(boxes: Tensor, shape: torch.Size, pool_size: int) -> Iterator[Taps]:
    """Taps of one sample of all borders ``(N, 4, B)`` after another, on maps ``(N * 4, C, H, W)``."""
    start, step = _lines(boxes, pool_size)
    maps = torch.arange(shape[0], device=boxes.device).repeat_interleave(boxes.shape[1])
    for number in range(pool_size + 1):
        y, x = (start + step * number).flatten(0, 2).unbind(1)
        yield regular(*bordered_corners(maps, y, x, shape))


def _check(x: Tensor, boxes: Tensor, shape: torch.Size | tuple[int, ...], pool_size: int) -> None:
    if x.dtype not in FLOATS or x.dim() != 4 or len(shape) != 4 or shape[1] % 4 or 0 in shape[2:]:
        raise ValueError(f"expected floating point (N, 4 * C, H, W), got {x.dtype} {tuple(shape)}")
    if boxes.dim() != 3 or boxes.shape[0] != shape[0] or boxes.shape[2] != 4 or boxes.device != x.device:
        raise ValueError(f"boxes is {tuple(boxes.shape)} on {boxes.device}, expected ({shape[0]}, B, 4) on {x.device}")
    if pool_size < 1:
        raise ValueError(f"pool_size is {pool_size}, expected at least 1")
