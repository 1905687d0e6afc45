"""Public op of what follows attention in a post-norm layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelgraft_core.point_attention.linear.ops import ROW_LINEAR
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = (
    "norm1_weight", "norm1_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm2_weight", "norm2_bias",
)  # fmt: skip


def norm_ffn(
    x: Tensor,
    update: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """``LN2(h + fc2(gelu(fc1(h))))`` with ``h = LN1(x + update)``: a post-norm transformer layer behind its attention.

    The GELU is the exact one, with erf. Normalization, GELU and sums are in float32 at least.

    Args:
        x, update: ``(N, C)`` float16, bfloat16, float32 or float64: the residual stream, and what attention adds to it.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: ``(C,)``; these and the following have the dtype of ``x``.
        fc1_weight, fc1_bias: ``(H, C)`` and ``(H,)``.
        fc2_weight, fc2_bias: ``(C, H)`` and ``(C,)``.
        eps: of both normalizations.

    Returns:
        ``(N, C)``, dtype of ``x``. Differentiable in all tensors. Under ``torch.autocast`` these are converted to its
        dtype first.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call.
    """
    if x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (N, C)")
    channels, hidden = x.shape[1], fc1_weight.shape[0] if fc1_weight.dim() else 0
    if hidden < 1:
        raise ValueError(f"fc1_weight is {tuple(fc1_weight.shape)}, expected (H, {channels})")
    weights = (norm1_weight, norm1_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm2_weight, norm2_bias)
    narrow = (channels,)
    shapes = narrow, narrow, (hidden, channels), (hidden,), (channels, hidden), narrow, narrow, narrow
    autocast = torch.is_autocast_enabled(x.device.type)
    named = zip(("update", *NAMES), (update, *weights), (tuple(x.shape), *shapes), strict=True)
    for name, tensor, shape in named:
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}")
        if tensor.device != x.device or (tensor.dtype != x.dtype and not autocast):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}")
    out: Tensor = NORM_FFN(x, update, *weights, eps)
    return out


def by_torch(
    x: Tensor,
    update: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float,
) -> Tensor:
    """The same in the dtype of ``x``."""
    shape = x.shape[1:]
    hidden = F.layer_norm(x + update, shape, norm1_weight, norm1_bias, eps)
    inner = F.linear(F.gelu(F.linear(hidden, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return F.layer_norm(hidden + inner, shape, norm2_weight, norm2_bias, eps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Everything between the input and the output is computed again: it would take seven times the memory of ``x``."""
    x, update, n1, n1_bias, w1, b1, w2, b2, n2, n2_bias = ctx.saved_tensors
    shape, aten, whole = x.shape[1:], torch.ops.aten, [True] * 3
    total = x + update
    hidden, mean1, scale1 = aten.native_layer_norm(total, shape, n1, n1_bias, ctx.eps)
    inner = ROW_LINEAR(hidden, w1, b1)
    active = F.gelu(inner)
    last = hidden + ROW_LINEAR(active, w2, b2)
    _, mean2, scale2 = aten.native_layer_norm(last, shape, n2, n2_bias, ctx.eps)
    backward = aten.native_layer_norm_backward
    grad_last, grad_n2, grad_n2_bias = backward(grad.contiguous(), last, shape, mean2, scale2, n2, n2_bias, whole)
    grad_inner = aten.gelu_backward(ROW_LINEAR(grad_last, w2.T, None), inner)
    grad_hidden = grad_last + ROW_LINEAR(grad_inner, w1.T, None)
    grad_total, grad_n1, grad_n1_bias = backward(grad_hidden, total, shape, mean1, scale1, n1, n1_bias, whole)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_b1, grad_b2 = grad_inner.sum(0, dtype=wide).to(b1.dtype), grad_last.sum(0, dtype=wide).to(b2.dtype)
    return (
        grad_total, grad_total, grad_n1, grad_n1_bias, grad_inner.T @ hidden, grad_b1, grad_last.T @ active, grad_b2,
        grad_n2, grad_n2_bias, None,
    )  # fmt: skip


NORM_FFN = Op(
    f"norm_ffn(Tensor x, Tensor update, {', '.join(f'Tensor {name}' for name in NAMES)}, float eps) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    gradient=(_gradients, _save),
    autocast=("x", "update", *NAMES),
)
NORM_FFN.register(Implementation("reference", reference.norm_ffn, ("cpu", "cuda")))
NORM_FFN.register(Implementation("torch", by_torch, ("cpu", "cuda"), 5))
for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
    _run, _supports = (
        deferred(f"kernelgraft_core.point_attention.norm_ffn.{_backend}", name)
        for name in ("norm_ffn", "supports_norm_ffn")
    )
    NORM_FFN.register(Implementation(_backend, _run, (_device,), 10, _supports))
