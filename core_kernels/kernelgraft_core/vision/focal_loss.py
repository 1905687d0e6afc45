"""Focal loss (arXiv 1708.02002) of sigmoids and of a softmax, element by element, with its own gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import wide

_SMALLEST = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss(
    x: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25, weight: Tensor | None = None
) -> Tensor:
    """``-alpha (1 - p)^gamma log p`` for the class that is meant, ``-(1 - alpha) p^gamma log(1 - p)`` for the others.

    Args:
        x: logits ``(N, C)`` float16, bfloat16, float32 or float64; ``p`` is their sigmoid.
        target: int64 ``(N,)``, the class; one that is not there, such as C, means none.
        weight: ``(C,)`` factors of the losses of all classes by the class that is meant; 1 where none is.

    Returns:
        ``(N, C)``, dtype of ``x``. Differentiable in ``x``.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    _check(x, target, weight)
    out: Tensor = _Sigmoid.apply(x, target, gamma, alpha, weight)  # type: ignore[no-untyped-call]
    return out


def sigmoid_focal_loss_backward(x: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    """The derivative of each loss by its own logit, ``(N, C)``."""
    p, q, meant, factor = _sigmoid_parts(x, target, weight)
    positive = q**gamma * (q - gamma * p * p.clamp(min=_SMALLEST).log())
    negative = p**gamma * (gamma * q * q.clamp(min=_SMALLEST).log() - p)
    return (-factor * torch.where(meant, alpha * positive, (1 - alpha) * negative)).to(x.dtype)


def softmax_focal_loss(
    probabilities: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25, weight: Tensor | None = None
) -> Tensor:
    """``-alpha (1 - p)^gamma log p`` of the class that is meant, from probabilities ``(N, C)`` that a softmax gave.

    Args:
        target: int64 ``(N,)``, the class; below 0 for a loss of zero.
        weight: ``(C,)`` factors by the class that is meant.

    Returns:
        ``(N,)``, dtype of ``probabilities``. For gradients see :func:`softmax_focal_loss_backward`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or, on a CPU, a class is not there.
    """
    p, factor = _softmax_parts(probabilities, target, weight)
    loss = -alpha * factor * (1 - p) ** gamma * p.clamp(min=_SMALLEST).log()
    return loss.to(probabilities.dtype)


def softmax_focal_loss_backward(
    probabilities: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None
) -> Tensor:
    """The derivative of each loss by the logits under the softmax, ``(N, C)``."""
    p, factor = _softmax_parts(probabilities, target, weight)
    # At p = 1 the logarithm is 0, and without care 0 * inf where gamma is below 1.
    power = torch.where(p < 1, (1 - p) ** (gamma - 1), 0)
    inner = alpha * factor * (gamma * power * p * p.clamp(min=_SMALLEST).log() - (1 - p) ** gamma)
    own = torch.arange(probabilities.shape[1], device=target.device) == target.unsqueeze(1)
    grad = inner.unsqueeze(1) * (own.to(inner.dtype) - probabilities.to(inner.dtype))
    return grad.to(probabilities.dtype)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, target, weight)
        ctx.gamma, ctx.alpha = gamma, alpha
        p, q, meant, factor = _sigmoid_parts(x, target, weight)
        positive = q**gamma * p.clamp(min=_SMALLEST).log()
        negative = p**gamma * q.clamp(min=_SMALLEST).log()
        return (-factor * torch.where(meant, alpha * positive, (1 - alpha) * negative)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight = ctx.saved_tensors
        return grad * sigmoid_focal_loss_backward(x, target, ctx.gamma, ctx.alpha, weight), None, None, None, None


def _sigmoid_parts(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, 1 - p, where the class is the one that is meant, and factors ``(N, 1)``."""
    logits = x.to(wide(x))
    meant = torch.arange(x.shape[1], device=x.device) == target.unsqueeze(1)
    return logits.sigmoid(), (-logits).sigmoid(), meant, _factor(logits, target, weight).unsqueeze(1)


def _softmax_parts(probabilities: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The probability of the class that is meant, and its factor: 0 where none is."""
    _check(probabilities, target, weight)
    if target.device.type == "cpu" and len(target) and int(target.max()) >= probabilities.shape[1]:
        raise ValueError(f"target goes up to {int(target.max())}, there are {probabilities.shape[1]} classes")
    p = probabilities.to(wide(probabilities)).gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    return p, torch.where(target < 0, 0, _factor(p, target, weight))


def _factor(like: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return like.new_ones(len(target))
    there = (target >= 0) & (target < len(weight))
    return torch.where(there, weight.to(like.dtype)[target.clamp(0, len(weight) - 1)], 1)


def _check(x: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] < 1:
        raise ValueError(f"expected floating point (N, C), got {x.dtype} {tuple(x.shape)}")
    if target.dtype != torch.int64 or target.shape != x.shape[:1] or target.device != x.device:
        raise ValueError(
            f"target is {target.dtype} {tuple(target.shape)} on {target.device}, "
            f"expected torch.int64 ({len(x)},) on {x.device}"
        )
    if weight is not None and (weight.shape != x.shape[1:] or weight.device != x.device):
        raise ValueError(f"weight is {tuple(weight.shape)} on {weight.device}, expected ({x.shape[1]},) on {x.device}")
