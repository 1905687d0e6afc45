"""Feature alignment of R3Det (arXiv 1908.05612): to every pixel the samples at its refined box are added."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import wide
from .rois import FLOATS
from .taps import TAPS_AT_ONCE, Taps, bordered_corners, gather, regular, scatter

# Of half the box's width along its own axis and of half its height across.
_CORNERS = ((0.0, 0.0), (1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))


def rotated_feature_align(x: Tensor, boxes: Tensor, spatial_scale: float = 1 / 8, points: int = 1) -> Tensor:
    """``x`` plus its samples at the centre of each pixel's box, and at its corners.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        boxes: ``(N, H, W, 5)``, y and x of the centre, width, height in pixels of the input image, and the angle in
            radians; not differentiated.
        spatial_scale: pixels of ``x`` per pixel of the input image.
        points: 1 for the centre, 5 for the four corners as well.

    Returns:
        ``(N, C, H, W)``, dtype of ``x``. Differentiable in ``x``.

    Raises:
        ValueError: a shape, dtype or device is wrong, or points is neither 1 nor 5.
    """
    _check(x, boxes, points)
    samples = gather(x, _taps(boxes.to(wide(x)), x.shape, spatial_scale, points))
    maps = samples.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
    return (x + maps).to(x.dtype)


def rotated_feature_align_backward(
    grad: Tensor, boxes: Tensor, spatial_scale: float = 1 / 8, points: int = 1
) -> Tensor:
    """The gradient of ``x`` from that of :func:`rotated_feature_align`."""
    _check(grad, boxes, points)
    rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
    found = scatter(rows, _taps(boxes.to(wide(grad)), grad.shape, spatial_scale, points), grad.shape)
    return (grad + found).to(grad.dtype)


def _taps(boxes: Tensor, shape: torch.Size, spatial_scale: float, points: int) -> list[Taps]:
    boxes = boxes.detach()
    images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(shape[2] * shape[3])
    flat = boxes.flatten(0, 2)
    centre, extent = flat[:, :2] * spatial_scale, flat[:, 2:4] * spatial_scale / 2
    cosine, sine = flat[:, 4].cos(), flat[:, 4].sin()
    at_once = max(1, TAPS_AT_ONCE // (4 * points))
    taps = []
    for part in (slice(i, i + at_once) for i in range(0, len(flat), at_once)):
        corners = []
        for along, across in _CORNERS[:points]:
            u, v = along * extent[part, 0], across * extent[part, 1]
            y = centre[part, 0] + (sine[part] * u + cosine[part] * v if points > 1 else 0)
            x = centre[part, 1] + (cosine[part] * u - sine[part] * v if points > 1 else 0)
            corners.append(bordered_corners(images[part], y, x, shape))
        taps.append(regular(*(torch.cat(each, 1) for each in zip(*corners, strict=True))))
    return taps


def _check(x: Tensor, boxes: Tensor, points: int) -> None:
    if x.dtype not in FLOATS or x.dim() != 4 or 0 in x.shape[2:]:
        raise ValueError(f"the feature map is {x.dtype} {tuple(x.shape)}, expected floating point (N, C, H, W)")
    shape = (len(x), *x.shape[2:], 5)
    if tuple(boxes.shape) != shape or boxes.device != x.device:
        raise ValueError(f"boxes is {tuple(boxes.shape)} on {boxes.device}, expected {shape} on {x.device}")
    if points not in (1, 5):
        raise ValueError(f"points is {points}, expected 1 or 5")
