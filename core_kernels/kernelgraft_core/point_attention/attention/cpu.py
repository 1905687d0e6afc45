"""Attention in groups on a CPU by the kernels of :mod:`.cpu_kernels`, which needs numba.

A few groups at a time stay in the second-level cache from the gathering of their rows to the output projection.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from kernelgraft_core.point_attention.cpu_weights import float_set, panels_of, set_for, unsupported
from kernelgraft_core.runtime.scratch import SCRATCH, laid_out
from kernelgraft_core.runtime.threads import available_threads, parallel_for

TILE_ROWS = 144  # of a tile, where groups are small
LARGEST_HEAD = 128


def grouped_attention(qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int) -> Tensor:
    channels = qkv.shape[1] // 3
    if not len(qkv):
        return qkv.new_empty((0, channels))
    single = qkv.float().contiguous()
    out = single.new_empty((len(qkv), channels))
    _run(single, None, out, (), (members, starts, owned), heads, size, torch.float32)
    return out.to(qkv.dtype)


def grouped_attention_grad(
    grad: Tensor, qkv: Tensor, members: Tensor, starts: Tensor, owned: Tensor, heads: int, size: int
) -> Tensor:
    if not len(qkv):
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)
    from .cpu_gradient import NUMBERS, gradient_kernel

    floats, channels, count = float_set(), grad.shape[1], len(owned)
    rows, grads = qkv.float().contiguous(), grad.float().contiguous()
    members, starts, owned = (each.contiguous() for each in (members, starts, owned))
    out, head_size = torch.empty_like(rows), channels // heads
    # Gradients of what is borrowed are added to those of what is owned, in a settled order.
    borrowed = None if len(members) == len(qkv) else rows.new_zeros((len(members), 2 * channels))
    scales = torch.tensor([math.log2(math.e) * head_size**-0.5, head_size**-0.5])
    slack = max(*floats.rows, floats.panel)
    row, grad_row, found_row = (4 * (n * channels + floats.lanes) for n in (3, 1, 1))
    turned, room = 4 * head_size * floats.panel, 4 * floats.panel * (size + slack)
    steps = row * (size + slack), grad_row * (size + slack), 3 * found_row * (size + slack), turned, turned, room, room
    places, end = laid_out(steps)
    parts = max(1, min(available_threads(), count))
    memory, scratch = SCRATCH.reserve(parts * end)
    told = (
        grads.data_ptr(), rows.data_ptr(), out.data_ptr(), 0 if borrowed is None else borrowed.data_ptr(), channels,
        heads, members.data_ptr(), starts.data_ptr(), owned.data_ptr(), count, parts, scratch, end, scales.data_ptr(),
        places[0], row, places[1], grad_row, places[2], 3 * found_row, *places[3:],
    )  # fmt: skip
    assert len(told) == NUMBERS
    parallel_for(gradient_kernel(floats, head_size).address, (ctypes.c_int64 * len(told))(*told), parts)
    del memory  # until here
    if borrowed is not None:
        used = int(starts[-1])
        is_borrowed = _is_borrowed(starts, owned, used)
        out[:, channels:].index_add_(0, members[:used][is_borrowed], borrowed[:used][is_borrowed])
    return out.to(qkv.dtype)


def _is_borrowed(starts: Tensor, owned: Tensor, used: int) -> Tensor:
    """Of each of the ``used`` places of members, whether it is not the group's own."""
    group = torch.repeat_interleave(torch.arange(len(owned)), starts.diff(), output_size=used)
    return torch.arange(used) - starts[group] >= owned[group]


def grouped_self_attention(
    x: Tensor,
    position: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    members: Tensor,
    starts: Tensor,
    owned: Tensor,
    heads: int,
    size: int,
) -> Tensor:
    if not len(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype = x.dtype if set_for(x.dtype).pairs else torch.float32
    moved = None if position is None else position.to(dtype).contiguous()
    rows = x.to(dtype).contiguous()
    out = torch.empty_like(rows)
    weights = in_weight, in_bias, out_weight, out_bias
    _run(rows, moved, out, weights, (members, starts, owned), heads, size, dtype)
    return out.to(x.dtype)


def _run(
    x: Tensor,
    position: Tensor | None,
    out: Tensor,
    weights: tuple[Tensor | None, ...],
    groups: tuple[Tensor, Tensor, Tensor],
    heads: int,
    size: int,
    dtype: torch.dtype,
) -> None:
    """Without weights, ``x`` holds queries, keys and values."""
    from . import cpu_kernels as kernels

    known, floats, channels = set_for(dtype), float_set(), out.shape[1]
    members, starts, owned = (each.contiguous() for each in groups)
    head_size, count = channels // heads, len(owned)
    scale = torch.tensor([math.log2(math.e) * head_size**-0.5])
    told = [0] * kernels.NUMBERS
    if weights:
        in_weight, in_bias, out_weight, out_bias = weights
        assert in_weight is not None
        assert out_weight is not None
        moved = panels_of(in_weight, in_bias, known, 0, 2 * channels)
        value = panels_of(in_weight, in_bias, known, 2 * channels, 3 * channels)
        last = panels_of(out_weight, out_bias, known)
        told[kernels.DEPTH : kernels.OUT_COLUMNS + 1] = [
            moved.depth, *(number for each in (moved, value, last)
                           for number in (each.weight.data_ptr(), each.bias.data_ptr(), each.columns)),
        ]  # fmt: skip
        qkv_step, depth, columns = 4 * (moved.columns + value.columns), moved.depth, last.columns
    else:
        qkv_step, depth, columns = 12 * channels, 0, 0
    per = max(1, TILE_ROWS // size)
    # Kernels work in whole blocks of rows and of vectors.
    slack = max(*known.rows, *floats.rows, floats.panel)
    rows, attended_step = per * size + slack, 4 * (channels + floats.lanes)
    places, end = laid_out(
        (
            rows * 4 * depth, rows * 4 * depth, rows * qkv_step + 4 * floats.panel, rows * attended_step,
            rows * 4 * depth if known.pairs else 0, rows * 4 * columns + 4 * channels, 4 * head_size * floats.panel,
            4 * (size + slack) * floats.panel, 4 * floats.panel,
        )
    )  # fmt: skip
    tiles = -(-count // per)
    parts = max(1, min(available_threads(), tiles))
    memory, scratch = SCRATCH.reserve(parts * end)
    told[: kernels.SCALE + 1] = [
        x.data_ptr(), 0 if position is None else position.data_ptr(), out.data_ptr(), channels, heads,
        members.data_ptr(), starts.data_ptr(), owned.data_ptr(), count, per, parts, scratch, end, scale.data_ptr(),
    ]  # fmt: skip
    b_moved, b_plain, b_qkv, b_attended, b_rounded, b_result, b_queries, b_scores, b_sums = places
    told[kernels.B_MOVED :] = [
        b_moved, b_plain, b_qkv, qkv_step, b_attended, attended_step, b_rounded, b_result, b_queries, b_scores, b_sums,
    ]  # fmt: skip
    kernel = kernels.attention_kernel(known, floats, head_size, bool(weights))
    parallel_for(kernel.address, (ctypes.c_int64 * len(told))(*told), parts)
    del memory  # until here


def supports_grouped_attention(qkv: Tensor, *rest: object) -> str | None:
    heads = rest[-2]
    assert isinstance(heads, int)
    return _unsupported(qkv, qkv.shape[1] // 3 // heads)


def supports_grouped_attention_grad(grad: Tensor, qkv: Tensor, *rest: object) -> str | None:
    return supports_grouped_attention(qkv, *rest)


def supports_grouped_self_attention(x: Tensor, *rest: object) -> str | None:
    heads = rest[-2]
    assert isinstance(heads, int)
    return _unsupported(x, x.shape[1] // heads)


def _unsupported(x: Tensor, head_size: int) -> str | None:
    if head_size > LARGEST_HEAD:
        return f"a head has {head_size} channels, more than {LARGEST_HEAD}"
    return unsupported(x)
