"""Public op of multi-scale deformable attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def deform_attention(value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of a few interpolated samples of each level (Deformable DETR, arXiv 2010.04159).

    Sums are in float32 at least, and do not depend on the number of threads.

    Args:
        value: ``(N, keys, heads, channels)`` float16, bfloat16, float32 or float64; the pixels of all levels one after
            another, row by row.
        sizes: int64 ``(L, 2)``, height and width of each level.
        starts: int64 ``(L,)``, the first key of each level.
        locations: ``(N, Q, heads, L, P, 2)``, x before y, in units of the level's size: 0 is the outer edge of the
            first pixel and 1 that of the last. Outside, the value is zero.
        weights: ``(N, Q, heads, L, P)``.

    Returns:
        ``(N, Q, heads * channels)``, dtype of ``value``. Differentiable in ``value``, ``locations`` and ``weights``.

    Raises:
        ValueError: a shape, dtype or device is wrong; on a CPU, and outside of compiled code, also a level that ends
            behind the last key: asking a GPU would mean to wait for it.
        NoBackendError: no backend can run the call.
    """
    _check(value, sizes, starts, locations, weights)
    out: Tensor = DEFORM_ATTENTION(value, sizes, starts, locations, weights)
    return out


def _check(value: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> None:
    if value.dtype not in FLOATS or value.dim() != 4:
        raise ValueError(f"value is {value.dtype} {tuple(value.shape)}, expected floats (N, keys, heads, channels)")
    if sizes.dtype != torch.int64 or sizes.dim() != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes is {sizes.dtype} {tuple(sizes.shape)}, expected torch.int64 (L, 2)")
    levels = sizes.shape[0]
    if starts.dtype != torch.int64 or starts.shape != (levels,):
        raise ValueError(f"starts is {starts.dtype} {tuple(starts.shape)}, expected torch.int64 ({levels},)")
    images, _, heads, _ = value.shape
    if (
        locations.dim() != 6
        or locations.shape[0] != images
        or locations.shape[2:4] != (heads, levels)
        or locations.shape[5] != 2
    ):
        raise ValueError(f"locations is {tuple(locations.shape)}, expected ({images}, Q, {heads}, {levels}, P, 2)")
    if weights.shape != locations.shape[:5]:
        raise ValueError(f"weights is {tuple(weights.shape)}, expected {tuple(locations.shape[:5])}")
    for name, tensor in (("locations", locations), ("weights", weights)):
        if tensor.dtype != value.dtype and not torch.is_autocast_enabled(value.device.type):
            raise ValueError(f"{name} is {tensor.dtype}, value {value.dtype}")
    for name, tensor in (("sizes", sizes), ("starts", starts), ("locations", locations), ("weights", weights)):
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
    if value.device.type == "cpu" and levels and not torch.compiler.is_compiling():
        ends = starts + sizes.prod(1)
        if sizes.min() < 1 or starts.min() < 0 or ends.max() > value.shape[1]:
            raise ValueError(f"levels of {sizes.tolist()} from {starts.tolist()} do not fit {value.shape[1]} keys")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, sizes, starts, locations, weights = ctx.saved_tensors
    by_value, by_locations, by_weights = DEFORM_ATTENTION_BACKWARD(grad, value, sizes, starts, locations, weights)
    return by_value, None, None, by_locations, by_weights


DEFORM_ATTENTION = Op(
    "deform_attention(Tensor value, Tensor sizes, Tensor starts, Tensor locations, Tensor weights) -> Tensor",
    fake=lambda value, sizes, starts, locations, weights: value.new_empty(
        (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    ),
    gradient=(_gradients, _save),
    autocast=("value", "locations", "weights"),
)
DEFORM_ATTENTION_BACKWARD = Op(
    "deform_attention_backward(Tensor grad, Tensor value, Tensor sizes, Tensor starts, Tensor locations,"
    " Tensor weights) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, value, sizes, starts, locations, weights: tuple(
        each.new_empty(each.shape) for each in (value, locations, weights)
    ),
)
for _op in (DEFORM_ATTENTION, DEFORM_ATTENTION_BACKWARD):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _run, _supports = (
        deferred("kernelgraft_core.vision.deform_attention.cpu", name) for name in (_op.name, f"supports_{_op.name}")
    )
    _op.register(Implementation("cpu", _run, ("cpu",), 10, _supports))
