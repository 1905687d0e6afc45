"""The W4A8 ops on a CPU: the weight expanded once to int8, and oneDNN's products of unsigned and signed bytes.

Four bits become eight without loss, so the integers are those of every other backend. The expanded weight takes one
byte per element beside the packed one; it is made at the first call and lives as long as the packed weight.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

from kernelgraft_core.runtime.device import cpu_int8_is_exact

from . import reference
from .reference import Quantized
from .weight import W4A8Weight

log = logging.getLogger("kernelgraft")

SHIFT = 128  # oneDNN's fast products take unsigned activations: signed ones fall to a path thousands of times slower

# Expanded weights by the identity of the packed one, with its version: tensors compare elementwise.
_expanded: dict[int, tuple[int, Tensor]] = {}


def quantize_activation(x: Tensor) -> Quantized:
    return reference.quantize_activation(x)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    return reference.rms_norm_quantize(x, weight, eps)


def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    return reference.silu_mul_quantize(gate_up)


def w4a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    n = qweight.shape[0]
    rows = q.reshape(-1, q.shape[-1])
    if not len(rows) or not n:
        return q.new_zeros((*q.shape[:-1], n), dtype=dtype)
    packed = _expand(W4A8Weight(qweight, scale, group_scale, group_zero, zero))
    unsigned = (rows.to(torch.int16) + SHIFT).to(torch.uint8)
    products: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, SHIFT, packed, torch.ones(n), torch.zeros(n, dtype=torch.int32), None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = products.to(wide).mul_(x_scale.reshape(-1, 1).to(wide)).mul_(scale.to(wide))
    if bias is not None:
        out += bias.to(wide)
    return out.to(dtype).view(*q.shape[:-1], n)


def w4a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    q, x_scale, x_sums = quantize_activation(x)
    return w4a8_matmul(q, x_scale, x_sums, qweight, scale, group_scale, group_zero, zero, bias, x.dtype)


def _expand(weight: W4A8Weight) -> Tensor:
    """The weight in oneDNN's layout. It has no dispatch keys of an ordinary tensor, so no module may hold it."""
    words = weight.qweight
    key, version = id(words), 0 if words.is_inference() else words._version
    known = _expanded.get(key)
    if known is not None and known[0] == version:
        return known[1]
    if known is None:
        weakref.finalize(words, _expanded.pop, key, None)
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.int8(), None)
    _expanded[key] = version, packed
    return packed


def _unsupported() -> str | None:
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "torch has no oneDNN int8 products here"
    return None if cpu_int8_is_exact() else "int8 products saturate on this processor: it lacks VNNI"


def supports_quantize_activation(*_: object) -> str | None:
    return None


supports_rms_norm_quantize = supports_silu_mul_quantize = supports_quantize_activation


def supports_w4a8_matmul(*args: object) -> str | None:
    dtype = args[-1]
    return "float64 is computed by the reference" if dtype == torch.float64 else _unsupported()


def supports_w4a8_linear(x: Tensor, *_: object) -> str | None:
    return "float64 is computed by the reference" if x.dtype == torch.float64 else _unsupported()
