"""Weights of any width that this package multiplies with: one type, one way to pack and one to multiply."""

from __future__ import annotations

from torch import Tensor

from .w3a16 import W3A16Weight, w3a16_linear
from .w4a8 import W4A8Weight, w4a8_linear
from .w4a16 import W4A16Weight, w4a16_linear

QuantizedWeight = W4A16Weight | W3A16Weight

# What a quantizer may yield for a layer, and :func:`linear` takes.
AnyWeight = QuantizedWeight | W4A8Weight


def pack_weight(q: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> W4A16Weight | W3A16Weight:
    """Pack integers ``q`` ``(N, K)`` in ``0 .. 2 ** bits - 1`` with ``scales`` and ``zeros`` ``(N, K / g)``.

    Raises:
        ValueError: ``bits`` is neither 3 nor 4, shapes disagree, K does not pack, or an integer does not fit.
    """
    if bits not in (3, 4):
        raise ValueError(f"bits is {bits}, expected 3 or 4")
    kind = W4A16Weight if bits == 4 else W3A16Weight
    return kind.from_integers(q, scales, zeros)


def linear(x: Tensor, weight: AnyWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` of ``x`` ``(..., K)``; see :func:`~kernelgraft_core.quant.w4a16.w4a16_linear`.

    With a :class:`~kernelgraft_core.quant.w4a8.W4A8Weight`, ``x`` is quantized too, and there is no gradient.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    if isinstance(weight, W4A8Weight):
        return w4a8_linear(x, *weight.tensors, bias)
    if isinstance(weight, W4A16Weight):
        return w4a16_linear(x, weight.qweight, weight.scales, weight.zeros, bias)
    return w3a16_linear(x, weight.qweight, weight.qhigh, weight.scales, weight.zeros, bias)
