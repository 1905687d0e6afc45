"""The weight that the W3A16 kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernelgraft_core.quant.int3 import pack_int3, unpack_int3
from kernelgraft_core.quant.packed.weight import PackedWeight


@dataclass(frozen=True)
class W3A16Weight(PackedWeight):
    """``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]`` with ``g = K / scales.shape[1]``.

    Attributes:
        qweight: int32 ``(N, K / 16)``, the two low bits of ``q``, contiguous.
        qhigh: int32 ``(N, K / 32)``, the top bit, contiguous; :mod:`kernelgraft_core.quant.int3` has the order of both.
        scales: float16 ``(N, K / g)``, ``g`` a multiple of 32.
        zeros: uint8 ``(N, K / g)``, 0..7.
    """

    bits: ClassVar[int] = 3
    planes: ClassVar[Mapping[str, int]] = {"qweight": 16, "qhigh": 32}

    qweight: Tensor
    qhigh: Tensor
    scales: Tensor
    zeros: Tensor

    @staticmethod
    def pack(q: Tensor) -> tuple[Tensor, ...]:
        return pack_int3(q)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.qweight, self.qhigh, self.scales, self.zeros

    def integers(self) -> Tensor:
        return unpack_int3(self.qweight, self.qhigh)
