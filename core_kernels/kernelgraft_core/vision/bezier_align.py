"""BezierAlign (ABCNet, arXiv 2002.10200): pooling between two cubic Bézier curves, for curved text."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import wide
from .rois import as_maps, as_sums, check_rois, check_rois_of
from .taps import Taps, counted, gather, mean_of_grids, scatter


def bezier_align(
    x: Tensor,
    beziers: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """The mean over upright bins whose centres lie between an upper and a lower curve.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        beziers: ``(R, 17)``, number of the image, then x and y of the four points of the upper curve from left to
            right, and of the lower one from right to left, in pixels of the input image; not differentiated.
        output_size, spatial_scale, sampling_ratio, aligned: as for ``roi_align``.

    Returns:
        ``(R, C, h, w)``, dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device is wrong, a bin asks for more than 2^22 samples, or, on a CPU, an image is
            not there.
    """
    check_rois(x, beziers, 17, output_size)
    taps = _taps(beziers.detach().to(wide(x)), x.shape, output_size, spatial_scale, sampling_ratio, aligned)
    return as_maps(gather(x, taps), len(beziers), output_size, x.dtype)


def bezier_align_backward(
    grad: Tensor,
    beziers: Tensor,
    shape: torch.Size | tuple[int, ...],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of :func:`bezier_align`, ``(R, C, h, w)``."""
    output_size = (grad.shape[2], grad.shape[3])
    check_rois_of(grad, beziers, 17, shape, output_size)
    taps = _taps(beziers.detach().to(wide(grad)), shape, output_size, spatial_scale, sampling_ratio, aligned)
    return scatter(as_sums(grad), taps, shape).to(grad.dtype)


def _taps(
    beziers: Tensor,
    shape: torch.Size | tuple[int, ...],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> list[Taps]:
    high, broad = output_size
    usable = beziers.isfinite().all(1)
    beziers = torch.where(usable.unsqueeze(1), beziers, 0)
    points = beziers[:, 1:].unflatten(1, (2, 4, 2)) * spatial_scale
    upper, lower = points[:, 0], points[:, 1].flip(1)
    extent = torch.maximum((upper[:, 0] - upper[:, 3]).abs(), (lower[:, 0] - lower[:, 3]).abs())
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = extent[:, [1, 0]] / extent.new_tensor([high, broad])  # y first
    # A bin's centre is where it begins along the curves, not half a bin further.
    along = torch.arange(broad, device=beziers.device, dtype=beziers.dtype) / broad
    down = (torch.arange(high, device=beziers.device, dtype=beziers.dtype) / high).view(1, high, 1, 1)
    powers = torch.stack(((1 - along) ** 3, 3 * along * (1 - along) ** 2, 3 * along**2 * (1 - along), along**3), 1)
    top, bottom = ((powers.unsqueeze(2) * curve.unsqueeze(1)).sum(2).unsqueeze(1) for curve in (upper, lower))
    centre = (bottom * down + top * (1 - down) - (0.5 if aligned else 0.0)).flatten(0, 2)
    boxes = torch.arange(len(beziers), device=beziers.device).repeat_interleave(high * broad)
    counts = [counted(bin_size[:, i], sampling_ratio) * usable for i in (0, 1)]

    def position(bins: Tensor, share_down: Tensor, share_across: Tensor) -> tuple[Tensor, Tensor]:
        box = boxes[bins]
        y = centre[bins, 1] + bin_size[box, 0] * (share_down - 0.5).to(centre.dtype)
        x = centre[bins, 0] + bin_size[box, 1] * (share_across - 0.5).to(centre.dtype)
        return y, x

    return mean_of_grids(beziers[boxes, 0].long(), counts[0][boxes], counts[1][boxes], position, shape)
