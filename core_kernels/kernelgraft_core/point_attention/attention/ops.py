"""Public ops of attention in groups: checked here once, run by the best backend at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.point_attention.groups import Groups
from kernelgraft_core.point_attention.linear.ops import ROW_LINEAR
from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def grouped_attention(qkv: Tensor, groups: Groups, heads: int) -> Tensor:
    """Scaled dot-product attention in groups of rows, as in FlatFormer (arXiv 2301.08739).

    Every row attends to the members of the group that owns it. What a row gets depends on the members of its group
    alone, not on the batch or the number of threads.

    Args:
        qkv: ``(N, 3 C)`` float16, bfloat16, float32 or float64: queries, keys and values, in each the heads side by
            side.
        groups: of N rows.
        heads: C is a multiple of it.

    Returns:
        ``(N, C)``, dtype of ``qkv``, contiguous, in the order of its rows. Differentiable in ``qkv``.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the value. On a CPU, and outside of compiled
            code, also a group with a row that is not there: asking a GPU would mean to wait for it.
        NoBackendError: no backend can run the call.
    """
    if qkv.dtype not in FLOATS or qkv.dim() != 2 or qkv.shape[1] % 3:
        raise ValueError(f"qkv is {qkv.dtype} {tuple(qkv.shape)}, expected floating point (N, 3 C)")
    _check_heads(qkv.shape[1] // 3, heads)
    _check_groups(groups, qkv)
    out: Tensor = ATTENTION(qkv, *groups.tensors, heads, groups.size)
    return out


def grouped_self_attention(
    x: Tensor,
    position: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    groups: Groups,
    heads: int,
) -> Tensor:
    """Multi-head self-attention in groups, with its projections: queries and keys of ``x + position``, values of ``x``.

    Args:
        x: ``(N, C)`` float16, bfloat16, float32 or float64.
        position: ``(N, C)`` or None, dtype of ``x``.
        in_weight, in_bias: ``(3 C, C)`` and ``(3 C,)`` or None, rows for queries, keys and values, as those of
            ``torch.nn.MultiheadAttention``; dtype of ``x``.
        out_weight, out_bias: ``(C, C)`` and ``(C,)`` or None.
        groups, heads: as for :func:`grouped_attention`.

    Returns:
        ``(N, C)``, dtype of ``x``. Differentiable in all tensors. Under ``torch.autocast`` these are converted to its
        dtype first.

    Raises:
        ValueError, NoBackendError: as :func:`grouped_attention`.
    """
    if x.dtype not in FLOATS or x.dim() != 2:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (N, C)")
    channels = x.shape[1]
    _check_heads(channels, heads)
    autocast = torch.is_autocast_enabled(x.device.type)
    shapes = tuple(x.shape), (3 * channels, channels), (3 * channels,), (channels, channels), (channels,)
    names = "position", "in_weight", "in_bias", "out_weight", "out_bias"
    tensors = position, in_weight, in_bias, out_weight, out_bias
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}")
        if tensor.device != x.device or (tensor.dtype != x.dtype and not autocast):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}")
    _check_groups(groups, x)
    out: Tensor = SELF_ATTENTION(
        x, position, in_weight, in_bias, out_weight, out_bias, *groups.tensors, heads, groups.size
    )
    return out


def _check_heads(channels: int, heads: int) -> None:
    if heads < 1 or channels < 1 or channels % heads:
        raise ValueError(f"{channels} channels do not split into {heads} heads")


def _check_groups(groups: Groups, rows: Tensor) -> None:
    if groups.rows != rows.shape[0]:
        raise ValueError(f"the groups are of {groups.rows} rows, there are {rows.shape[0]}")
    for name in ("members", "starts", "owned"):
        tensor = getattr(groups, name)
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.device != rows.device:
            raise ValueError(
                f"{name} of the groups is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected one "
                f"dimension of torch.int32 on {rows.device}"
            )
    if groups.starts.shape[0] != groups.owned.shape[0] + 1:
        raise ValueError(f"the groups have {groups.starts.shape[0]} starts for {groups.owned.shape[0]} groups")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere asking would wait
        known = _looked_into.of(groups.tensors, set)
        if (groups.rows, groups.size) not in known:
            _look_into(groups)
            known.add((groups.rows, groups.size))


_looked_into: Derived[set[tuple[int, int]]] = Derived()


def _look_into(groups: Groups) -> None:
    """Raise where a kernel that trusts the groups would read or write what is not there, or leave a row out."""
    members, starts, owned = groups.tensors
    if len(members):
        low, high = (int(each) for each in members.aminmax())
        if low < 0 or high >= groups.rows:
            raise ValueError(f"members of the groups go from {low} to {high}, expected 0 to {groups.rows - 1}")
    lengths, total = starts.diff(), int(starts[-1])
    if int(starts[0]) != 0 or total > len(members) or bool((lengths < 0).any()):
        raise ValueError(f"starts of the groups do not ascend from 0 to at most {len(members)}")
    if len(lengths) and (bool((owned > lengths).any()) or bool((owned < 0).any()) or int(lengths.max()) > groups.size):
        raise ValueError(f"a group owns more members than it has, or has more than {groups.size}")
    group = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=total)
    is_own = torch.arange(total) - starts[group] < owned[group]
    times = torch.bincount(members[:total][is_own], minlength=groups.rows)
    if bool((times != 1).any()):
        row = int((times != 1).nonzero()[0])
        raise ValueError(f"row {row} is owned by {int(times[row])} groups, expected 1")


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def _attention_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found: Tensor = GRAD(grad, *ctx.saved_tensors, ctx.heads, ctx.size)
    return found, None, None, None, None, None


def _self_attention_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Queries, keys and values are computed again: keeping them would take four times the memory of ``x``."""
    x, position, in_weight, in_bias, out_weight, out_bias, *groups = ctx.saved_tensors
    channels = x.shape[1]
    moved = x if position is None else x + position
    two, (moved_bias, x_bias) = 2 * channels, (None, None) if in_bias is None else in_bias.tensor_split((2 * channels,))
    qkv = torch.cat((ROW_LINEAR(moved, in_weight[:two], moved_bias), ROW_LINEAR(x, in_weight[two:], x_bias)), 1)
    grad_out_weight = grad.T @ ATTENTION(qkv, *groups, ctx.heads, ctx.size) if ctx.needs_input_grad[4] else None
    inner = GRAD(ROW_LINEAR(grad, out_weight.T, None), qkv, *groups, ctx.heads, ctx.size)
    for_moved, for_x = inner[:, :two], inner[:, two:]
    grad_moved = ROW_LINEAR(for_moved, in_weight[:two].T, None)
    grad_x = grad_moved + ROW_LINEAR(for_x, in_weight[two:].T, None)
    grad_in_weight = torch.cat((for_moved.T @ moved, for_x.T @ x)) if ctx.needs_input_grad[2] else None
    return (
        grad_x, None if position is None else grad_moved, grad_in_weight, _bias_gradient(inner, in_bias),
        grad_out_weight, _bias_gradient(grad, out_bias), None, None, None, None, None,
    )  # fmt: skip


def _bias_gradient(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(bias.dtype)


_GROUPS = "Tensor members, Tensor starts, Tensor owned, int heads, SymInt size"
ATTENTION = Op(
    f"grouped_attention(Tensor qkv, {_GROUPS}) -> Tensor",
    fake=lambda qkv, *_: qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3)),
    gradient=(_attention_gradient, _save_attention),
)
GRAD = Op(
    f"grouped_attention_grad(Tensor grad, Tensor qkv, {_GROUPS}) -> Tensor",
    fake=lambda grad, qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)
SELF_ATTENTION = Op(
    "grouped_self_attention(Tensor x, Tensor? position, Tensor in_weight, Tensor? in_bias, Tensor out_weight, "
    f"Tensor? out_bias, {_GROUPS}) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    gradient=(_self_attention_gradients, _save_attention),
    autocast=("x", "position", "in_weight", "in_bias", "out_weight", "out_bias"),
)
for _op in (ATTENTION, GRAD, SELF_ATTENTION):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _torch = deferred("kernelgraft_core.point_attention.attention.batched", _op.name)
    _op.register(Implementation("torch", _torch, ("cpu", "cuda"), 5))
    for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
        _run, _supports = (
            deferred(f"kernelgraft_core.point_attention.attention.{_backend}", name)
            for name in (_op.name, f"supports_{_op.name}")
        )
        _op.register(Implementation(_backend, _run, (_device,), 10, _supports))
