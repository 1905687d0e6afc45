"""The plainest correct multi-scale deformable attention, level by level, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelgraft_core.vision.taps import padded_corners, pixel_table, regular, scatter

SAMPLES_AT_ONCE = 1 << 26  # values of all channels


def deform_attention(value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32)
    of_an_image = max(1, value.shape[2] * value.shape[3] * locations.shape[1] * locations.shape[4])
    images = max(1, SAMPLES_AT_ONCE // of_an_image)
    levels = list(zip(sizes.tolist(), starts.tolist(), strict=True))
    if not (value.numel() and weights.numel()):
        return value.new_zeros((len(value), locations.shape[1], value.shape[2] * value.shape[3]))
    found = [
        _images(levels, *(each[i : i + images].to(wide) for each in (value, locations, weights)))
        for i in range(0, len(value), images)
    ]
    return torch.cat(found).to(value.dtype)


def _images(levels: list[tuple[list[int], int]], value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    heads, channels = value.shape[2:]
    total = value.new_zeros((len(value) * heads, channels, locations.shape[1]))
    for level, ((height, width), start) in enumerate(levels):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (samples * weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)
    out: Tensor = total.view(len(value), heads * channels, -1).transpose(1, 2)
    return out.contiguous()


def deform_attention_backward(
    grad: Tensor, value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(value.dtype, torch.float32)
    by_value, by_locations, by_weights = (torch.zeros_like(each, dtype=dtype) for each in (value, locations, weights))
    if not (value.numel() and weights.numel()):
        return by_value.to(value.dtype), by_locations.to(locations.dtype), by_weights.to(weights.dtype)
    grads = grad.to(dtype).unflatten(2, value.shape[2:]).transpose(1, 2)  # images, heads, queries, channels
    for image in range(len(value)):
        for level, ((height, width), start) in enumerate(zip(sizes.tolist(), starts.tolist(), strict=True)):
            keys = slice(start, start + height * width)
            found = _level_backward(
                grads[image],
                value[image, keys].to(dtype).permute(1, 2, 0).unflatten(2, (height, width)),
                locations[image, :, :, level].to(dtype).transpose(0, 1),
                weights[image, :, :, level].to(dtype).transpose(0, 1),
            )
            by_value[image, keys] += found[0].flatten(2).permute(2, 0, 1)
            by_locations[image, :, :, level] = found[1].transpose(0, 1)
            by_weights[image, :, :, level] = found[2].transpose(0, 1)
    return by_value.to(value.dtype), by_locations.to(locations.dtype), by_weights.to(weights.dtype)


def _level_backward(grad: Tensor, maps: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one level of one image; every tensor has its heads first."""
    heads, channels, height, width = maps.shape
    queries, points = weights.shape[1:]
    extent = locations.new_tensor([width, height])
    x, y = (locations.flatten(0, 2) * extent - 0.5).unbind(1)
    head = torch.arange(heads, device=grad.device).repeat_interleave(queries * points)
    pixels, shares = padded_corners(head, y, x, maps.shape)
    corners = pixel_table(maps)[pixels].view(heads, queries, points, 4, channels)
    s1, s2, s3, s4 = torch.einsum("hqpkc,hqc->khqp", corners, grad).flatten(1)
    shared = torch.stack((s1, s2, s3, s4), 1)
    # Outside everything that was read is zero; only the shares may be no numbers there.
    down, across = ((at - at.floor()).nan_to_num(0, 0, 0) for at in (y, x))
    by_x = (1 - down) * (s2 - s1) + down * (s4 - s3)
    by_y = (1 - across) * (s3 - s1) + across * (s4 - s2)
    by_position = torch.stack((by_x, by_y), 1) * extent * weights.reshape(-1, 1)
    counted = shares * weights.reshape(-1, 1)
    taps = regular(pixels.view(heads * queries, -1), counted.view(heads * queries, -1))
    by_maps = scatter(grad.reshape(heads * queries, channels), [taps], maps.shape)
    return by_maps, by_position.view(locations.shape), (shared * shares).sum(1).view(weights.shape)
