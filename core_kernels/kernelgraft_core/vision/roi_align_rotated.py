"""RoIAlign of rotated boxes, and its rotation-invariant form (ReDet, arXiv 2103.07733)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import wide
from .rois import as_maps, as_sums, check_rois, check_rois_of
from .taps import Taps, counted, gather, mean_of_grids, scatter


def roi_align_rotated(
    x: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
) -> Tensor:
    """The mean over evenly spaced samples of each bin of boxes that are rotated about their centres.

    Args:
        x: ``(N, C, H, W)`` float16, bfloat16, float32 or float64. Sums are in float32 at least.
        rois: ``(R, 6)``, number of the image, then x and y of the centre, width, height in pixels of the input image,
            and the angle in radians; not differentiated.
        output_size: bins of each box, ``(h, w)``.
        spatial_scale: pixels of ``x`` per pixel of the input image.
        sampling_ratio: samples of a bin along each axis; 0 for one a pixel.
        aligned: pixel centres are half a pixel from the corner. False: they are the corner, and boxes are at least one
            pixel wide.
        clockwise: how the angle counts in an image whose y goes down.

    Returns:
        ``(R, C, h, w)``, dtype of ``x``. Bins of boxes without extent, infinite or NaN are zero.

    Raises:
        ValueError: a shape, dtype or device is wrong, a bin asks for more than 2^22 samples, or, on a CPU, an image is
            not there.
    """
    check_rois(x, rois, 6, output_size)
    taps = _taps(rois.detach().to(wide(x)), x.shape, output_size, spatial_scale, sampling_ratio, aligned, clockwise)
    return as_maps(gather(x, taps), len(rois), output_size, x.dtype)


def roi_align_rotated_backward(
    grad: Tensor,
    rois: Tensor,
    shape: torch.Size | tuple[int, ...],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of :func:`roi_align_rotated`, ``(R, C, h, w)``."""
    output_size = (grad.shape[2], grad.shape[3])
    check_rois_of(grad, rois, 6, shape, output_size)
    taps = _taps(rois.detach().to(wide(grad)), shape, output_size, spatial_scale, sampling_ratio, aligned, clockwise)
    return scatter(as_sums(grad), taps, shape).to(grad.dtype)


def riroi_align_rotated(
    x: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    orientations: int = 8,
    clockwise: bool = False,
) -> Tensor:
    """:func:`roi_align_rotated`, not aligned, with the channels of ``orientations`` turned by the angle of the box.

    Args:
        x: ``(N, C * orientations, H, W)``, the orientations of a channel one after another.

    Other arguments, the result ``(R, C * orientations, h, w)`` and errors as for :func:`roi_align_rotated`.
    """
    _check_orientations(x.shape, orientations)
    found = roi_align_rotated(x, rois, output_size, spatial_scale, sampling_ratio, False, clockwise)
    first, second, share = _turns(rois, orientations, found)
    turned = found.unflatten(1, (-1, orientations))
    low, high = (turned.gather(2, each.expand_as(turned)) for each in (first, second))
    mixed: Tensor = (1 - share) * low + share * high
    return mixed.flatten(1, 2).to(x.dtype)


def riroi_align_rotated_backward(
    grad: Tensor,
    rois: Tensor,
    shape: torch.Size | tuple[int, ...],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    orientations: int = 8,
    clockwise: bool = False,
) -> Tensor:
    """The gradient of ``x``, of that shape, from that of :func:`riroi_align_rotated`."""
    _check_orientations(shape, orientations)
    first, second, share = _turns(rois, orientations, grad)
    grads = grad.unflatten(1, (-1, orientations)).to(share.dtype)
    # Each orientation goes to another one: to turn back is to scatter without meeting.
    back = torch.zeros_like(grads).scatter(2, first.expand_as(grads), (1 - share) * grads)
    back += torch.zeros_like(grads).scatter(2, second.expand_as(grads), share * grads)
    found = roi_align_rotated_backward(back.flatten(1, 2), rois, shape, spatial_scale, sampling_ratio, False, clockwise)
    return found.to(grad.dtype)


def _check_orientations(shape: torch.Size | tuple[int, ...], orientations: int) -> None:
    if orientations < 1 or shape[1] % orientations:
        raise ValueError(f"{shape[1]} channels are not a multiple of {orientations} orientations")


def _turns(rois: Tensor, orientations: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each box and orientation the two that it is mixed of, and the share of the second; ``(R, 1, O, 1, 1)``."""
    turn = rois[:, 5].detach().nan_to_num(0, 0, 0).to(wide(like)) * orientations / (2 * math.pi)
    whole = turn.floor()
    own = torch.arange(orientations, device=rois.device)
    first = (own - whole.long().unsqueeze(1)) % orientations
    second = (first + 1) % orientations
    first, second = (each[:, None, :, None, None] for each in (first, second))
    return first, second, (turn - whole)[:, None, None, None, None]


def _taps(
    rois: Tensor,
    shape: torch.Size | tuple[int, ...],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> list[Taps]:
    high, broad = output_size
    usable = rois.isfinite().all(1)
    rois = torch.where(usable.unsqueeze(1), rois, 0)
    centre = rois[:, [2, 1]] * spatial_scale - (0.5 if aligned else 0.0)
    size = rois[:, [4, 3]] * spatial_scale
    if not aligned:
        size = size.clamp(min=1)
    angle = -rois[:, 5] if clockwise else rois[:, 5]
    cosine, sine = angle.cos(), angle.sin()
    boxes = torch.arange(len(rois), device=rois.device).repeat_interleave(high * broad)
    each = torch.arange(high * broad, device=rois.device).repeat(len(rois))
    counts = [counted(size[:, i] / output_size[i], sampling_ratio) * usable for i in (0, 1)]

    def position(bins: Tensor, down: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        box = boxes[bins]
        v = size[box, 0] * ((each[bins] // broad + down) / high - 0.5).to(size.dtype)
        u = size[box, 1] * ((each[bins] % broad + across) / broad - 0.5).to(size.dtype)
        y = v * cosine[box] - u * sine[box] + centre[box, 0]
        x = v * sine[box] + u * cosine[box] + centre[box, 1]
        return y, x

    return mean_of_grids(rois[boxes, 0].long(), counts[0][boxes], counts[1][boxes], position, shape)
