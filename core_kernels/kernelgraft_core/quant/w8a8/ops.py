"""Public W8A8 ops: checked here once, run by the best backend at hand. They have no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8.ops import check_activation, check_quantized, register_backends
from kernelgraft_core.runtime.op import Op

from . import reference

_WEIGHT = "Tensor qweight, Tensor scale, Tensor? bias"

MATMUL = Op(
    f"w8a8_matmul(Tensor q, Tensor x_scale, Tensor x_sums, {_WEIGHT}, ScalarType dtype) -> Tensor",
    fake=lambda q, x_scale, x_sums, qweight, *rest: q.new_empty((*q.shape[:-1], qweight.shape[0]), dtype=rest[-1]),
)
LINEAR = Op(
    f"w8a8_linear(Tensor x, {_WEIGHT}) -> Tensor",
    fake=lambda x, qweight, *rest: x.new_empty((*x.shape[:-1], qweight.shape[0])),
    autocast=("x", "bias"),
)
for _op in (MATMUL, LINEAR):
    register_backends(_op, reference)


def w8a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``x @ W.T + bias`` with ``W[n, k] = scale[n] * qweight[n, k]`` for activations that are quantized already.

    The integers are summed exactly in 32 bits; scales and bias follow in float32.

    Args:
        q, x_scale, x_sums: as :func:`~kernelgraft_core.quant.w4a8.quantize_activation` returns them.
        qweight: int8 ``(N, K)``; scale: float16 ``(N,)``; bias: ``(N,)``.
        dtype: of the result.

    Returns:
        ``(..., N)``, contiguous.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    n, k = _check_weight(qweight, scale)
    check_quantized(q, x_scale, x_sums, bias, dtype, (n, k), qweight)
    out: Tensor = MATMUL(q, x_scale, x_sums, qweight, scale, bias, dtype)
    return out


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`~kernelgraft_core.quant.w4a8.quantize_activation` of ``x`` and :func:`w8a8_matmul` in one.

    Args:
        x: ``(..., K)`` float16, bfloat16, float32 or float64, any strides; the others as for :func:`w8a8_matmul`.

    Returns:
        ``(..., N)`` of the dtype of ``x``, contiguous. A token that holds NaN or infinity gives a row of NaN. Under
        ``torch.autocast``, ``x`` and ``bias`` are converted to its dtype first.

    Raises:
        ValueError, NoBackendError: as for :func:`w8a8_matmul`.
    """
    check_activation(x, bias, _check_weight(qweight, scale), qweight)
    out: Tensor = LINEAR(x, qweight, scale, bias)
    return out


def _check_weight(qweight: Tensor, scale: Tensor) -> tuple[int, int]:
    if qweight.dtype != torch.int8 or qweight.dim() != 2:
        raise ValueError(f"qweight is {qweight.dtype} {tuple(qweight.shape)}, expected torch.int8 (N, K)")
    n, k = qweight.shape
    if scale.dtype != torch.float16 or scale.shape != (n,) or scale.device != qweight.device:
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}, expected torch.float16 ({n},) on "
            f"{qweight.device}"
        )
    return n, k
