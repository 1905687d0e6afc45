"""What the layouts of 4-bit weights for 8-bit activations have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.quant.weights import AnyWeight

from .layout import Layout


@dataclass(frozen=True)
class W4A8Layout(Layout):
    """A format of QoQ (QServe, arXiv 2405.04532); group size -1 is its per-channel variant."""

    activation_bits: ClassVar[int] = 8

    def write(self, weight: AnyWeight) -> dict[str, Tensor]:
        if not isinstance(weight, W4A8Weight):
            raise ValueError(f"{self.label} holds weights for activations of 8 bits, not a {type(weight).__name__}")
        k = weight.in_features
        if weight.group_size != k // self.groups(k) or (weight.zero is None) == (self.group_size == -1):
            raise ValueError(f"the weight has groups of {weight.group_size}, the format {self.group_size}")
        self.parts(weight.out_features, k)
        return {part: tensor.contiguous() for part, tensor in self._write(weight.plain()).items()}

    @abstractmethod
    def _write(self, weight: W4A8Weight) -> dict[str, Tensor]: ...


def check_finite(name: str, scale: Tensor) -> None:
    """Refuse a scale that is NaN or infinite."""
    if not scale.isfinite().all():
        raise ValueError(f"{name} is not finite everywhere")
