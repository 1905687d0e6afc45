"""The linear layer of AutoAWQ GEMM checkpoints."""

from __future__ import annotations

import torch

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.packed_linear import PackedLinear


class AwqLinear(PackedLinear):
    """A :class:`~kernelgraft_core.quant.packed_linear.PackedLinear` stored as AutoAWQ GEMM.

    Args:
        in_features, out_features: K and N; multiples of 8.
        group_size: weights per scale along K, a multiple of 8; -1 is the whole row.
        bias: whether the layer has one, of type ``dtype``.

    Raises:
        ValueError: the group size does not divide K, or N is not a multiple of 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        size = in_features if group_size == -1 else group_size
        if size <= 0 or size % 8 or in_features % size or out_features % 8:
            raise ValueError(
                f"an AWQ layer of {in_features} x {out_features} cannot have group size {group_size}: "
                "it must divide the inputs, and 8 the outputs"
            )
        super().__init__(in_features, out_features, Gemm(4, size), bias, dtype, device)
