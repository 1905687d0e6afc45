"""Public W4A16 ops: checked here once, run by the best backend at hand."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scales, zeros, _ = inputs
    ctx.save_for_backward(qweight, scales, zeros)


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The weight is frozen (LoRA on a quantized base needs the input's gradient only); the bias sums over tokens.
    wants_x, _, _, _, wants_bias = ctx.needs_input_grad
    grad_x = _w4a16_linear_dgrad(grad.contiguous(), *ctx.saved_tensors) if wants_x else None
    return grad_x, None, None, None, grad.unsqueeze(0).flatten(0, -2).sum(0) if wants_bias else None


_w4a16_linear = Op(
    "w4a16_linear(Tensor x, Tensor qweight, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor",
    fake=lambda x, qweight, scales, zeros, bias: x.new_empty((*x.shape[:-1], qweight.shape[0])),
    gradient=(_linear_gradient, _save_weight),
    autocast=("x", "bias"),
)
_w4a16_linear_dgrad = Op(
    "w4a16_linear_dgrad(Tensor grad, Tensor qweight, Tensor scales, Tensor zeros) -> Tensor",
    fake=lambda grad, qweight, scales, zeros: grad.new_empty((*grad.shape[:-1], qweight.shape[1] * 8)),
)
_dequantize_w4a16 = Op(
    "dequantize_w4a16(Tensor qweight, Tensor scales, Tensor zeros, ScalarType dtype) -> Tensor",
    fake=lambda qweight, scales, zeros, dtype: qweight.new_empty((qweight.shape[0], qweight.shape[1] * 8), dtype=dtype),
)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _without_triton(*_: Any) -> str:
    return "Triton is not installed"


for _op in (_w4a16_linear, _w4a16_linear_dgrad, _dequantize_w4a16):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _op.register(
        Implementation(
            "cpu",
            deferred(f"{__package__}.cpu", _op.name),
            ("cpu",),
            priority=10,
            supports=deferred(f"{__package__}.cpu", f"supports_{_op.name}"),
        )
    )
    _op.register(
        Implementation(
            "triton",
            deferred(f"{__package__}.triton", _op.name),
            ("cuda",),
            priority=10,
            # Imported at first use: importing the ops must not start Triton.
            supports=deferred(f"{__package__}.triton", f"supports_{_op.name}") if _HAS_TRITON else _without_triton,
        )
    )


def _check_weight(qweight: Tensor, scales: Tensor, zeros: Tensor) -> None:
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise ValueError(f"qweight is {qweight.dtype} {tuple(qweight.shape)}, expected torch.int32 (N, K / 8)")
    if scales.dtype != torch.float16 or zeros.dtype != torch.uint8:
        raise ValueError(f"scales are {scales.dtype} and zeros {zeros.dtype}, expected torch.float16 and torch.uint8")
    rows, k = qweight.shape[0], qweight.shape[1] * 8
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape != scales.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected ({rows}, K / group size)")
        if tensor.device != qweight.device:
            raise ValueError(f"{name} is on {tensor.device}, qweight on {qweight.device}")
    groups = scales.shape[1]
    if k == 0 or groups == 0 or k % groups or (k // groups) % 8:
        raise ValueError(f"K = {k} does not split into {groups} groups of a multiple of 8")


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with a 4-bit weight that is dequantized on the way (AWQ, arXiv 2306.00978; GPTQ alike).

    ``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]``; products are summed in float32 at least.

    Args:
        x: ``(..., K)`` float16, bfloat16, float32 or float64, any strides.
        qweight: int32 ``(N, K / 8)``, the layout of :class:`~kernelgraft_core.quant.w4a16.W4A16Weight`.
        scales: float16 ``(N, K / g)``.
        zeros: uint8 ``(N, K / g)``, 0..15.
        bias: ``(N,)`` of the dtype of ``x``.

    Returns:
        ``(..., N)``, contiguous, dtype of ``x``. Differentiable in ``x`` and ``bias``. Under ``torch.autocast``, ``x``
        and ``bias`` are converted to its dtype first, as for ``F.linear``.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    _check_weight(qweight, scales, zeros)
    _check_activation("x", x, qweight, qweight.shape[1] * 8)
    alike = bias is None or bias.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    if bias is not None and (bias.shape != qweight.shape[:1] or not alike or bias.device != x.device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, "
            f"expected {x.dtype} ({qweight.shape[0]},) on {x.device}"
        )
    out: Tensor = _w4a16_linear(x, qweight, scales, zeros, bias)
    return out


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Gradient of :func:`w4a16_linear` with respect to ``x``: ``grad @ W``.

    Args:
        grad: ``(..., N)``, as ``x`` in :func:`w4a16_linear`; the weight likewise.

    Returns:
        ``(..., K)``, contiguous, dtype of ``grad``.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
    """
    _check_weight(qweight, scales, zeros)
    _check_activation("grad", grad, qweight, qweight.shape[0])
    out: Tensor = _w4a16_linear_dgrad(grad, qweight, scales, zeros)
    return out


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight ``(N, K)`` in ``dtype``, contiguous; arguments as for :func:`w4a16_linear`.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
    """
    _check_weight(qweight, scales, zeros)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    out: Tensor = _dequantize_w4a16(qweight, scales, zeros, dtype)
    return out


def _check_activation(name: str, x: Tensor, qweight: Tensor, features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name} is {tuple(x.shape)}, expected (..., {features})")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}, expected one of {FLOATS}")
    if x.device != qweight.device:
        raise ValueError(f"{name} is on {x.device}, qweight on {qweight.device}")
