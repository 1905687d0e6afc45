"""What the weights of all widths have in common: integers in packed planes, with a scale and a zero point per group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor


class PackedWeight(ABC):
    """``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]`` with ``g = K / scales.shape[1]``.

    Subclasses are frozen dataclasses of ``qweight``, further planes of the integers, ``scales`` and ``zeros``, all with
    N rows. The logical shapes are the same everywhere; :meth:`arranged` only changes strides.

    Attributes:
        bits: of an integer.
        planes: names of the packed int32 tensors, and of how many columns a word of each holds bits.
    """

    bits: ClassVar[int]
    planes: ClassVar[Mapping[str, int]]
    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    @abstractmethod
    def __init__(self, *tensors: Tensor) -> None: ...

    @staticmethod
    @abstractmethod
    def pack(q: Tensor) -> tuple[Tensor, ...]:
        """The planes of integers ``(N, K)``.

        Raises:
            ValueError: K does not fill the last word of each row, or an integer does not fit in ``bits``.
        """

    @abstractmethod
    def integers(self) -> Tensor:
        """``q`` as uint8 ``(N, K)``."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The planes, the scales and the zeros, as the constructor and the ops take them."""

    @classmethod
    def from_integers(cls, q: Tensor, scales: Tensor, zeros: Tensor) -> Self:
        """Pack integers ``q`` ``(N, K)`` in ``0 .. 2 ** bits - 1`` with ``scales`` and ``zeros`` ``(N, K / g)``.

        Raises:
            ValueError: shapes disagree, K does not fill the last word of each row, or an integer does not fit.
        """
        if scales.shape != zeros.shape or scales.shape[0] != q.shape[0]:
            raise ValueError(
                f"q is {tuple(q.shape)}, scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)}: they disagree"
            )
        largest = (1 << cls.bits) - 1
        if zeros.numel() and (zeros.min() < 0 or zeros.max() > largest):
            raise ValueError(f"zeros span {int(zeros.min())}..{int(zeros.max())}, expected 0..{largest}")
        return cls(*cls.pack(q), scales.to(torch.float16), zeros.to(torch.uint8)).arranged()

    def arranged(self) -> Self:
        """The same weight with the strides its device reads fastest: groups innermost on CPU, rows innermost on GPU."""
        *planes, scales, zeros = self.tensors
        if scales.device.type == "cpu":
            scales, zeros = scales.contiguous(), zeros.contiguous()
        else:
            scales, zeros = scales.T.contiguous().T, zeros.T.contiguous().T
        return type(self)(*(plane.contiguous() for plane in planes), scales, zeros)

    def to(self, device: torch.device | str) -> Self:
        """The weight on another device, arranged for it."""
        return type(self)(*(tensor.to(device) for tensor in self.tensors)).arranged()

    @classmethod
    def unit(cls) -> int:
        """Columns that fill a word of every plane: what K, group sizes and slices along K are multiples of."""
        return max(cls.planes.values())

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] * self.planes["qweight"]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the packed words, int32: hosts ask a layer's weight whether it is floating point."""
        return self.qweight.dtype
