"""Active rotating filters (arXiv 1701.01833): one filter turned into all its rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def active_rotated_filter(weight: Tensor, indices: Tensor) -> Tensor:
    """Every rotation of every filter.

    Args:
        weight: ``(C_out, C_in, O, kh, kw)``, O orientations of each input channel.
        indices: integers ``(O, kh, kw, R)``, for each entry of a filter its place in rotation ``r``, counted from 1. No
            two entries have the same place.

    Returns:
        ``(C_out * R, C_in * O, kh, kw)``, dtype of ``weight``. Differentiable.

    Raises:
        ValueError: the shapes do not fit.
    """
    flat, places = _flat(weight.shape, indices)
    rotations = places.shape[1]
    target = places.t().view(1, rotations, 1, flat).expand(weight.shape[0], -1, weight.shape[1], -1)
    entries = weight.reshape(weight.shape[0], 1, weight.shape[1], flat).expand(-1, rotations, -1, -1)
    found = torch.zeros_like(entries, memory_format=torch.contiguous_format).scatter(3, target, entries)
    return found.view(weight.shape[0] * rotations, weight.shape[1] * weight.shape[2], *weight.shape[3:])


def active_rotated_filter_backward(grad: Tensor, indices: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The gradient of ``weight``, of that shape, from that of :func:`active_rotated_filter`."""
    flat, places = _flat(shape, indices)
    rotations = places.shape[1]
    source = places.t().view(1, rotations, 1, flat).expand(shape[0], -1, shape[1], -1)
    grads = grad.reshape(shape[0], rotations, shape[1], flat)
    return grads.gather(3, source).sum(1).view(tuple(shape))


def _flat(shape: torch.Size | tuple[int, ...], indices: Tensor) -> tuple[int, Tensor]:
    if len(shape) != 5 or indices.dim() != 4 or tuple(indices.shape[:3]) != tuple(shape[2:]):
        raise ValueError(f"the filters are {tuple(shape)} and indices {tuple(indices.shape)}")
    return shape[2] * shape[3] * shape[4], indices.flatten(0, 2).long() - 1
