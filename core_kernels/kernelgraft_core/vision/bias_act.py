"""A bias, an activation function, a gain and a clamp in one, and its derivatives (StyleGAN2, arXiv 1912.04958)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import wide

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


@dataclass(frozen=True)
class _Activation:
    """A function ``y`` of ``(x, alpha)``, and its first and second derivatives as functions of ``(x, y, alpha)``.

    ``x`` is used by what cannot be told from ``y`` alone.
    """

    value: Callable[[Tensor, float], Tensor]
    first: Callable[[Tensor, Tensor, float], Tensor]
    second: Callable[[Tensor, Tensor, float], Tensor]


def _zero(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return torch.zeros_like(y)


def _step(below: Callable[[Tensor, float], Tensor], above: float = 1.0) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda x, y, alpha: torch.where(y > 0, above, below(y, alpha))


def _swish_first(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def _swish_second(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    s = x.sigmoid()
    return s * (1 - s) * (2 + x * (1 - 2 * s))


ACTIVATIONS = {
    "linear": _Activation(lambda x, a: x, lambda x, y, a: torch.ones_like(y), _zero),
    "relu": _Activation(lambda x, a: x.relu(), lambda x, y, a: (y > 0).to(y.dtype), _zero),
    "lrelu": _Activation(F.leaky_relu, _step(lambda y, a: torch.full_like(y, a)), _zero),
    "tanh": _Activation(
        lambda x, a: x.tanh(), lambda x, y, a: 1 - y.square(), lambda x, y, a: -2 * y * (1 - y.square())
    ),
    "sigmoid": _Activation(
        lambda x, a: x.sigmoid(), lambda x, y, a: y * (1 - y), lambda x, y, a: y * (1 - y) * (1 - 2 * y)
    ),
    "elu": _Activation(lambda x, a: F.elu(x), _step(lambda y, a: y + 1), _step(lambda y, a: y + 1, 0.0)),
    "selu": _Activation(
        lambda x, a: F.selu(x),
        _step(lambda y, a: y + _SELU_SCALE * _SELU_ALPHA, _SELU_SCALE),
        _step(lambda y, a: y + _SELU_SCALE * _SELU_ALPHA, 0.0),
    ),
    "softplus": _Activation(
        lambda x, a: F.softplus(x), lambda x, y, a: -(-y).expm1(), lambda x, y, a: -(-y).exp() * (-y).expm1()
    ),
    "swish": _Activation(lambda x, a: F.silu(x), _swish_first, _swish_second),
}


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
) -> Tensor:
    """``clamp(gain * act(x + bias))``, computed in float32 at least.

    Args:
        x: floating point, any shape.
        bias: ``(x.shape[dim],)``, or None.
        act: one of ``ACTIVATIONS``.
        alpha: slope of ``lrelu`` below zero.
        clamp: largest magnitude, or None.

    Returns:
        As ``x``. Differentiable, any number of times.

    Raises:
        ValueError: act is unknown, or bias does not fit.
    """
    value = _activation(act).value(_biased(x, bias, dim), alpha) * gain
    return (value if clamp is None else value.clamp(-clamp, clamp)).to(x.dtype)


def bias_act_derivative(
    order: int,
    x: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
) -> Tensor | None:
    """The first or second derivative of :func:`bias_act` by ``x``, element by element, float32 at least.

    Args:
        order: 1 or 2.
        x: as for :func:`bias_act`; needed by ``swish``.
        y: its result; needed by all others but ``linear``.

    Returns:
        As ``y`` or ``x``; zero where the result is clamped. None if neither is given: it is ``gain`` then, or 0.
    """
    activation = _activation(act)
    like = x if x is not None else y
    if like is None:
        return None
    x = _biased(like if x is None else x, bias if x is not None else None, dim)
    value = activation.value(x, alpha) if y is None else y.to(x.dtype) / gain
    found = (activation.first if order == 1 else activation.second)(x, value, alpha) * gain
    if clamp is not None:
        found = torch.where((value * gain).abs() < clamp, found, 0)
    return found


def _activation(act: str) -> _Activation:
    if act not in ACTIVATIONS:
        raise ValueError(f"there is no activation {act!r}, known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def _biased(x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    values = x.to(wide(x))
    if bias is None:
        return values
    if bias.dim() != 1 or not 0 <= dim < x.dim() or len(bias) != x.shape[dim]:
        raise ValueError(f"bias is {tuple(bias.shape)}, x {tuple(x.shape)}, the dimension {dim}")
    return values + bias.to(values.dtype).view([-1 if i == dim else 1 for i in range(x.dim())])
