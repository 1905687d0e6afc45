"""Point-wise spatial attention (PSANet, ECCV 2018): masks around each pixel laid over the whole image."""

from __future__ import annotations

import torch
from torch import Tensor


def psa_mask(masks: Tensor, mask_size: tuple[int, int], *, distribute: bool = False) -> Tensor:
    """What a pixel's mask says of every pixel of the image, zero where the mask does not reach.

    Args:
        masks: ``(N, mask height * mask width, H, W)``, for each pixel a mask that is centred on it.
        mask_size: ``(height, width)`` of the masks.
        distribute: how the result is read, see below.

    Returns:
        ``(N, H * W, H, W)``, dtype of ``masks``. At ``[n, q, y, x]`` is what the mask of pixel ``(y, x)`` says of pixel
        ``q``; with ``distribute``, what the mask of pixel ``q`` says of ``(y, x)``. Differentiable.

    Raises:
        ValueError: masks is not ``(N, mask height * mask width, H, W)``.
    """
    high, broad = mask_size
    if masks.dim() != 4 or min(mask_size) < 1 or masks.shape[1] != high * broad or 0 in masks.shape[2:]:
        raise ValueError(f"masks is {tuple(masks.shape)}, expected (N, {high} * {broad}, H, W)")
    height, width = masks.shape[2:]
    split = masks.unflatten(1, (high, broad))
    across, reaches = _shifts(width, broad, masks.device)
    rows = []
    for row in range(height):
        # Row by row: the places to read for all of them would take as much memory as the result, twice over.
        down = torch.arange(height, device=masks.device) - row + (high - 1) // 2
        on = ((down >= 0) & (down < high)).view(-1, 1, 1) & reaches
        there = split[:, :, :, row].index_select(
            1, down.clamp(0, high - 1)
        )  # images, target rows, mask columns, pixels
        picked = there.gather(2, across.expand(len(masks), height, width, width))
        rows.append(torch.where(on, picked, 0))
    found = torch.stack(rows, 3)  # images, y of q, x of q, y, x
    if distribute:
        found = found.permute(0, 3, 4, 1, 2)
    return found.reshape(len(masks), height * width, height, width)


def psa_mask_backward(grad: Tensor, mask_size: tuple[int, int], *, distribute: bool = False) -> Tensor:
    """The gradient of ``masks`` from that of :func:`psa_mask`."""
    high, broad = mask_size
    height, width = grad.shape[2:]
    grads: Tensor = grad.unflatten(1, (height, width))
    if distribute:
        grads = grads.permute(0, 3, 4, 1, 2)
    # The mask's entry (a, b) of pixel (y, x) is at the pixel (y + a - centre, x + b - centre), once at most.
    columns = torch.arange(width, device=grad.device)
    target = torch.arange(broad, device=grad.device).unsqueeze(1) + columns - (broad - 1) // 2
    on_columns = (target >= 0) & (target < width)
    out = grad.new_zeros((len(grad), high, broad, height, width))
    for row in range(height):
        down = torch.arange(high, device=grad.device) + row - (high - 1) // 2
        on = ((down >= 0) & (down < height)).view(-1, 1, 1) & on_columns
        there = grads[:, :, :, row].index_select(1, down.clamp(0, height - 1))
        index = target.clamp(0, width - 1).expand(len(grad), high, broad, width)
        out[:, :, :, row] = torch.where(on, there.gather(2, index), 0)
    return out.flatten(1, 2)


def _shifts(width: int, broad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which column of a mask speaks of column ``j`` for the pixel in column ``x``, ``(j, x)``, and whether one does."""
    columns = torch.arange(width, device=device)
    across = columns.unsqueeze(1) - columns + (broad - 1) // 2
    return across.clamp(0, broad - 1), (across >= 0) & (across < broad)
