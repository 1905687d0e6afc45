"""The weight that the W4A16 kernels read, whatever checkpoint it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernelgraft_core.quant.int4 import pack_int4, unpack_int4
from kernelgraft_core.quant.packed.weight import PackedWeight


@dataclass(frozen=True)
class W4A16Weight(PackedWeight):
    """``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]`` with ``g = K / scales.shape[1]``.

    Attributes:
        qweight: int32 ``(N, K / 8)``; row ``n`` packed along ``k`` in :data:`kernelgraft_core.quant.int4.INTERLEAVED`
            order, contiguous.
        scales: float16 ``(N, K / g)``.
        zeros: uint8 ``(N, K / g)``, 0..15.
    """

    bits: ClassVar[int] = 4
    planes: ClassVar[Mapping[str, int]] = {"qweight": 8}

    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    @staticmethod
    def pack(q: Tensor) -> tuple[Tensor, ...]:
        return (pack_int4(q),)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.qweight, self.scales, self.zeros

    def integers(self) -> Tensor:
        return unpack_int4(self.qweight)
