"""The steps of batch normalization between which processes exchange their statistics; float32 throughout."""

from __future__ import annotations

from torch import Tensor


def moments(x: Tensor, mean: Tensor | None = None) -> Tensor:
    """Of ``x (N, C, S)`` each channel's mean, float32 ``(C,)``, or the mean square of its distance from ``mean``."""
    values = x.float()
    if mean is not None:
        values = (values - mean.view(1, -1, 1)).square()
    return values.mean((0, 2))


def normalized(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(x - mean) / deviation``, float32, and the deviation ``sqrt(variance + eps)``, ``(C,)``."""
    deviation = (variance + eps).sqrt()
    return (x.float() - mean.view(1, -1, 1)) / deviation.view(1, -1, 1), deviation


def follow(running: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    """Move running statistics a share of the way to new ones, in place."""
    running.copy_(momentum * value + (1 - momentum) * running)


def parameter_gradients(grad: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, float32 ``(C,)``, from the output's and the normalized input, ``(N, C, S)``."""
    grads = grad.float()
    return (grads * norm).sum((0, 2)), grads.sum((0, 2))


def input_gradient(
    grad: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, norm: Tensor, deviation: Tensor
) -> Tensor:
    """The gradient of the input ``(N, C, S)``, dtype of ``grad``; those of the parameters are means over processes."""
    of_all = (grad_weight.view(1, -1, 1) * norm + grad_bias.view(1, -1, 1)) / (grad.shape[0] * grad.shape[2])
    found: Tensor = (weight / deviation).view(1, -1, 1) * (grad.float() - of_all)
    return found.to(grad.dtype)


def unbiased(variance: Tensor, count: int) -> Tensor:
    """The estimate of the variance from ``count`` values."""
    return variance * count / (count - 1) if count > 1 else variance.clone()
