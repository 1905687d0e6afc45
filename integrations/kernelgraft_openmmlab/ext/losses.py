"""Focal losses."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core.vision import focal_loss as core

__all__ = (
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(core.sigmoid_focal_loss(input, target, gamma, alpha, _given(weight)))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    grad_input.copy_(core.sigmoid_focal_loss_backward(input, target, gamma, alpha, _given(weight)))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(core.softmax_focal_loss(input, target, gamma, alpha, _given(weight)))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    grad_input.copy_(core.softmax_focal_loss_backward(input, target, gamma, alpha, _given(weight)))


def _given(weight: Tensor) -> Tensor | None:
    return weight if weight.numel() else None
