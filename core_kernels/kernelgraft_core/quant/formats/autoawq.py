"""AutoAWQ's GEMM layout, the de facto AWQ checkpoint: exact packing in both directions.

Per linear layer ``qweight`` int32 ``(K, N / 8)``, ``qzeros`` int32 ``(K / g, N / 8)`` and ``scales`` float16
``(K / g, N)``; nibble ``i`` of word ``c`` is column ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]`` and ``W = (q - z) * s``. The
order is the one of :mod:`kernelgraft_core.quant.int4`, only that here it runs along N and in
:class:`~kernelgraft_core.quant.w4a16.W4A16Weight` along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.int4 import pack_int4, unpack_int4
from kernelgraft_core.quant.w4a16.weight import W4A16Weight


def unpack_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> W4A16Weight:
    """Read one linear layer.

    Args:
        qweight: int32 ``(K, N / 8)``.
        qzeros: int32 ``(K / g, N / 8)``.
        scales: ``(K / g, N)``, converted to float16.

    Raises:
        ValueError: dtypes or shapes are not those of one GEMM layer (GEMV checkpoints have other shapes).
    """
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected two-dimensional torch.int32")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = qzeros.shape[0]
    if qzeros.shape != (groups, n // 8) or scales.shape != (groups, n) or groups == 0 or k % groups or k % 8:
        raise ValueError(
            f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)} and scales {tuple(scales.shape)} "
            "are not one AutoAWQ GEMM layer"
        )
    return W4A16Weight.from_integers(
        unpack_int4(qweight).T.contiguous(), scales.T.contiguous(), unpack_int4(qzeros).T.contiguous()
    )


def pack_gemm(weight: W4A16Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Write one linear layer: ``(qweight, qzeros, scales)`` as :func:`unpack_gemm` takes them, contiguous.

    Raises:
        ValueError: N is not a multiple of 8, which the layout cannot hold.
    """
    if weight.out_features % 8:
        raise ValueError(f"AutoAWQ GEMM packs 8 columns to a word; this layer has {weight.out_features}")
    return (
        pack_int4(weight.integers().T),
        pack_int4(weight.zeros.T),
        weight.scales.T.contiguous(),
    )
