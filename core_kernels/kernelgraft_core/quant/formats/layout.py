"""What a checkpoint format stores of one quantized linear layer: one description per format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernelgraft_core.quant.packed.weight import PackedWeight
from kernelgraft_core.quant.weights import AnyWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


@dataclass(frozen=True)
class Part:
    """What one tensor of a layer must be. The first dtype is the one that is written."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]

    @property
    def written(self) -> StoredTensor:
        return StoredTensor(self.dtypes[0], self.shape)

    def fits(self, found: StoredTensor) -> bool:
        return found.dtype in self.dtypes and found.shape == self.shape

    def __str__(self) -> str:
        return f"{' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)} {self.shape}"


@dataclass(frozen=True)
class Layout(ABC):
    """A checkpoint format with its settings: the tensors of a layer of N outputs and K inputs, and how they are read.

    Everything is by the part of the name that follows the layer's: ``"qweight"``, ``"scales"``. A ``"bias"`` ``(N,)``
    may stand beside any layer and is no part of it.

    Attributes:
        bits: of an integer.
        group_size: along K; -1 is the whole row.
        symmetric: the zero point is ``2 ** (bits - 1)`` everywhere, and not stored.

    Raises:
        ValueError: a setting is not one of this format; the message gives its name and value.
    """

    label: ClassVar[str]
    activation_bits: ClassVar[int] = 16  # that the weights are meant for
    widths: ClassVar[tuple[int, ...]] = (4,)
    may_be_symmetric: ClassVar[bool] = False
    packed: ClassVar[str] = "qweight"  # the part that says that a layer is quantized, and gives N and K
    scale: ClassVar[str] = "scales"

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in self.widths:
            raise ValueError(f"bits = {self.bits!r}, but {self.label} has {' or '.join(map(str, self.widths))}")
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < -1 or size == 0:
            raise ValueError(f"group_size = {size!r}, expected a positive number, or -1 for whole rows")
        if self.symmetric and not self.may_be_symmetric:
            raise ValueError(f"symmetric = {self.symmetric!r}, but {self.label} always stores zero points")

    @abstractmethod
    def features(self, packed: StoredTensor) -> tuple[int, int]:
        """N and K, from the packed integers. Of the right rank, that is all that is known of them."""

    @abstractmethod
    def parts(self, n: int, k: int) -> dict[str, Part]:
        """The tensors of a layer.

        Raises:
            ValueError: the format cannot hold N x K; the message gives the number that does not fit.
        """

    @abstractmethod
    def _read(self, tensors: Mapping[str, Tensor]) -> AnyWeight: ...

    @abstractmethod
    def _write(self, weight: Any) -> dict[str, Tensor]: ...

    @abstractmethod
    def config(self, skipped: Sequence[str] | None) -> dict[str, Any]:
        """The ``quantization_config`` that a checkpoint in this format needs.

        Args:
            skipped: modules that are not quantized, None for the host's own defaults.
        """

    @property
    def zero(self) -> int:
        """The zero point of a symmetric layer."""
        return 1 << (self.bits - 1)

    def groups(self, k: int) -> int:
        """Groups in a row.

        Raises:
            ValueError: the group size does not divide K.
        """
        if self.group_size == -1:
            return 1
        if k % self.group_size:
            raise ValueError(f"K = {k} is no multiple of group size {self.group_size}")
        return k // self.group_size

    def check(self, found: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """N and K of a layer whose tensors are exactly those of this format.

        Raises:
            ValueError: a tensor is missing, of another dtype or shape, or unknown; the message names it.
        """
        packed = found.get(self.packed)
        if packed is None:
            raise ValueError(f"{self.packed} is missing beside {', '.join(sorted(found))}")
        if len(packed.shape) != 2:
            raise ValueError(f"{self.packed} is {packed}, expected two dimensions")
        n, k = self.features(packed)
        wanted = self.parts(n, k)
        for part, expected in wanted.items():
            stored = found.get(part)
            if stored is None or not expected.fits(stored):
                beside = "" if part == self.packed else f"{self.packed} {packed.shape} with "
                raise ValueError(
                    f"{part} is {stored or 'missing'}, but {beside}group size {self.group_size} goes with {expected} "
                    f"in {self.label}"
                )
        bias = found.get("bias")
        if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
            raise ValueError(f"bias is {bias}, expected {(n,)}")
        if any("g_idx" in part for part in found):
            raise ValueError("g_idx says that its columns are permuted (act-order), which other layouts cannot hold")
        if unknown := sorted(set(found) - set(wanted) - {"bias"}):
            raise ValueError(f"{', '.join(unknown)} is no part of a layer in {self.label}")
        return n, k

    def read(self, tensors: Mapping[str, Tensor]) -> AnyWeight:
        """The weight that the kernels take, exactly; scales become float16.

        Raises:
            ValueError: as for :meth:`check`, or a value that the weight cannot hold.
        """
        self.check({part: StoredTensor.of(tensor) for part, tensor in tensors.items()})
        return self._read(tensors)

    def write(self, weight: AnyWeight) -> dict[str, Tensor]:
        """The tensors of a layer, contiguous, in the order and dtypes of :meth:`parts`.

        Raises:
            ValueError: the weight has other bits or groups than this format, or a shape that it cannot hold.
        """
        if not isinstance(weight, PackedWeight):
            raise ValueError(f"{self.label} holds weights for activations of 16 bits, not a {type(weight).__name__}")
        n, k = weight.out_features, weight.in_features
        if weight.bits != self.bits:
            raise ValueError(f"the weight has {weight.bits} bits, the format {self.bits}")
        if weight.scales.shape[1] != self.groups(k):
            raise ValueError(f"the weight has groups of {weight.group_size}, the format {self.group_size}")
        if self.symmetric and not (weight.zeros == self.zero).all():
            raise ValueError(f"the format is symmetric, but zero points are not all {self.zero}")
        self.parts(n, k)
        return {part: tensor.contiguous() for part, tensor in self._write(weight).items()}
