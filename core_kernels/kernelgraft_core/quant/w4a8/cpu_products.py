"""Products of quantized activations and byte weights on a CPU: our kernels where they run, else oneDNN's.

W4A8 and W8A8 share it. An arranged weight of 4 bits is multiplied as it is. Any other is expanded once to a byte per
element: at its first call, beside the packed one, for as long as that lives; four bits become eight without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernelgraft_core.quant.packed.cpu_integer import KINDS
from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.runtime.notices import warn_once

from . import cpu_integer, cpu_onednn, reference
from .cpu_onednn import Packed
from .cpu_panels import Panels, byte_set, panels_of_bytes
from .reference import Quantized

_weights: Derived[Panels | Packed] = Derived()


def unsupported(dtype: object) -> str | None:
    """Why nothing here computes in a dtype on this processor, or None."""
    if dtype not in KINDS:
        return f"{str(dtype).removeprefix('torch.')} is computed by the reference"
    return None if byte_set() is not None else cpu_onednn.unsupported()


def quantize(x: Tensor) -> Quantized:
    """See :func:`~kernelgraft_core.quant.w4a8.quantize_activation`."""
    if byte_set() is None or not x.numel() or x.dtype not in KINDS:
        return reference.quantize_activation(x)
    return cpu_integer.quantize(x.contiguous())


def as_bytes(tensors: Sequence[Tensor | None], int8: Callable[[], Tensor], scale: Tensor) -> Panels | Packed:
    """A weight of these tensors, whose elements are ``int8()``, for our kernels, or for oneDNN's where they do not run.

    It is kept as long as the first of them lives.
    """
    if byte_set() is None:
        warn_once("W4A8 and W8A8 run on oneDNN: numba is not installed, or this processor is of another kind")
        return _weights.of(tensors, lambda: cpu_onednn.pack(int8(), scale))
    return _weights.of(tensors, lambda: panels_of_bytes(int8(), scale))


def linear(x: Tensor, weight: Panels | Packed, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` ``(..., N)``."""
    if isinstance(weight, Packed):
        return matmul(*quantize(x), weight, bias, x.dtype)
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], weight.rows))
    return cpu_integer.linear(x.contiguous(), weight, _bias(bias))


def matmul(
    q: Tensor, x_scale: Tensor, x_sums: Tensor, weight: Panels | Packed, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same for activations that are quantized already."""
    shape = *q.shape[:-1], weight.rows
    if not q.numel() or not weight.rows:
        return q.new_zeros(shape, dtype=dtype)
    if isinstance(weight, Packed):
        return cpu_onednn.product(q.reshape(-1, q.shape[-1]), x_scale, weight, bias, dtype).view(shape)
    contiguous = q.contiguous(), x_scale.contiguous(), x_sums.contiguous()
    return cpu_integer.matmul(*contiguous, weight, _bias(bias), dtype)


def _bias(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return (bias if bias.dtype in KINDS else bias.float()).contiguous()
