"""Batch normalization over processes; mmcv itself exchanges the statistics between these steps."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core.vision import batch_norm as core

__all__ = (
    "sync_bn_backward_data",
    "sync_bn_backward_param",
    "sync_bn_forward_mean",
    "sync_bn_forward_output",
    "sync_bn_forward_var",
)


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    mean.copy_(core.moments(input))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    var.copy_(core.moments(input, mean))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    normalized, deviation = core.normalized(input, mean, var, eps)
    norm.copy_(normalized)
    std.copy_(deviation)
    if weight is not None and bias is not None:
        normalized = normalized * weight.float().view(1, -1, 1) + bias.float().view(1, -1, 1)
    output.copy_(normalized)
    if running_mean is not None and running_var is not None:
        core.follow(running_mean, mean, momentum)
        count = input.shape[0] * input.shape[2] * group_size
        core.follow(running_var, core.unbiased(var, count), momentum)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    found = core.parameter_gradients(grad_output, norm)
    grad_weight.copy_(found[0])
    grad_bias.copy_(found[1])


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    grad_input.copy_(core.input_gradient(grad_output, weight.float(), grad_weight, grad_bias, norm, std))
