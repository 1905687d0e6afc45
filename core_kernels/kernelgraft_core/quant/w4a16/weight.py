"""The weight that the W4A16 kernels read, whatever checkpoint it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.quant.int4 import pack_int4, unpack_int4


@dataclass(frozen=True)
class W4A16Weight:
    """``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]`` with ``g = K / scales.shape[1]``.

    Attributes:
        qweight: int32 ``(N, K / 8)``; row ``n`` packed along ``k`` in :data:`kernelgraft_core.quant.int4.INTERLEAVED`
            order, contiguous.
        scales: float16 ``(N, K / g)``.
        zeros: uint8 ``(N, K / g)``, 0..15.

    The logical shapes are the same everywhere; :meth:`arranged` only changes strides.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def from_integers(cls, q: Tensor, scales: Tensor, zeros: Tensor) -> W4A16Weight:
        """Pack integers ``q`` ``(N, K)`` in 0..15 with ``scales`` and ``zeros`` ``(N, K / g)``.

        Raises:
            ValueError: shapes disagree, K is not a multiple of 8, or an integer is outside 0..15.
        """
        if scales.shape != zeros.shape or scales.shape[0] != q.shape[0]:
            raise ValueError(
                f"q is {tuple(q.shape)}, scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)}: they disagree"
            )
        if zeros.numel() and (zeros.min() < 0 or zeros.max() > 15):
            raise ValueError(f"zeros span {int(zeros.min())}..{int(zeros.max())}, expected 0..15")
        return cls(pack_int4(q), scales.to(torch.float16), zeros.to(torch.uint8)).arranged()

    def arranged(self) -> W4A16Weight:
        """The same weight with the strides its device reads fastest: groups innermost on CPU, rows innermost on GPU."""
        scales, zeros = self.scales, self.zeros
        if self.qweight.device.type == "cpu":
            scales, zeros = scales.contiguous(), zeros.contiguous()
        else:
            scales, zeros = scales.T.contiguous().T, zeros.T.contiguous().T
        return W4A16Weight(self.qweight.contiguous(), scales, zeros)

    def integers(self) -> Tensor:
        """``q`` as uint8 ``(N, K)``."""
        return unpack_int4(self.qweight)

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] * 8

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[1]
