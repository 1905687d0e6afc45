"""Multi-scale deformable attention on a CPU: nothing gathered, four rows of channels read for each sample."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import parallel_for


@functools.cache
def _kernels() -> ModuleType:
    from . import cpu_kernels

    return cpu_kernels


def deform_attention(value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    images, keys, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    rows = _plain(value, locations, weights)
    out = rows[0].new_empty((images, queries, heads * channels))
    numbers = (queries, heads, levels, points, channels, keys)
    _run(_kernels().forward.address, numbers, (*rows, out), sizes, starts, images * queries, 16)
    return out.to(value.dtype)


def deform_attention_backward(
    grad: Tensor, value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    images, keys, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    rows = _plain(value, locations, weights, grad)
    # A level may have no queries, and keys may belong to no level; the rest is written whole.
    by_value = torch.zeros_like(rows[0])
    by_locations, by_weights = torch.empty_like(rows[1]), torch.empty_like(rows[2])
    numbers = (queries, heads, levels, points, channels, keys)
    outputs = (by_value, by_locations, by_weights)
    # A level of a head of an image belongs to one thread: nobody else adds to its rows.
    _run(_kernels().backward.address, numbers, (*rows, *outputs), sizes, starts, images * levels * heads, 1)
    return by_value.to(value.dtype), by_locations.to(locations.dtype), by_weights.to(weights.dtype)


def supports_deform_attention(*tensors: Tensor) -> str | None:
    if any(each.dtype == torch.float64 for each in tensors):
        return "float64 is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_deform_attention_backward = supports_deform_attention


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.detach().float().contiguous() for each in tensors)


def _run(
    kernel: int,
    numbers: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    sizes: Tensor,
    starts: Tensor,
    items: int,
    grain: int,
) -> None:
    levels = torch.cat((sizes, starts.unsqueeze(1)), 1).contiguous()
    args = (*numbers, levels.data_ptr(), *(each.data_ptr() for each in tensors))
    parallel_for(kernel, (ctypes.c_int64 * len(args))(*args), items, grain=grain)
