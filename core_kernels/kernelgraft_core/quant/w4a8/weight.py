"""The weight of W4A8: 4-bit integers that expand without loss to int8, and one floating-point scale per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from . import cpu_panels
from .cpu_panels import byte_set


@dataclass(frozen=True)
class W4A8Weight:
    """``W[n, k] = scale[n] * int8[n, k]``, in one of two forms (QServe, arXiv 2405.04532).

    In groups of ``g`` columns, ``int8 = q * group_scale - group_zero``: progressive quantization. One group is the
    whole row, ``int8 = q - zero``: per-channel quantization. Shapes are logical; kernels repack for themselves.

    Attributes:
        qweight: uint8 ``(N, K / 2)``; the low nibble of byte ``i`` is column ``2 i``. Or as :meth:`arranged` gives it.
        scale: float16 ``(N,)``.
        group_scale: uint8 ``(N, K / g)``, at least 1; None per channel. Or as :meth:`arranged` gives it.
        group_zero: uint8 ``(N, K / g)``, the zero point in steps of int8, so *scaled*: for a zero point ``z`` among
            the 16 integers it is ``z * group_scale``, and a zero point that was subtracted after scaling is it already.
        zero: uint8 ``(N,)``, 0..15; None in groups.
    """

    bits: ClassVar[int] = 4

    qweight: Tensor
    scale: Tensor
    group_scale: Tensor | None = None
    group_zero: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def from_integers(
        cls,
        q: Tensor,
        scale: Tensor,
        *,
        group_scale: Tensor | None = None,
        group_zero: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> Self:
        """Pack integers ``q`` ``(N, K)`` in 0..15; the others as the attributes, of any integer or float dtype.

        Raises:
            ValueError: shapes disagree, K is odd, a number is out of range or not finite, or int8 would overflow.
        """
        if q.dim() != 2 or q.shape[1] % 2:
            raise ValueError(f"q is {tuple(q.shape)}, expected (N, K) with an even K")
        _check_range("q", q, 0, 15)
        qweight = (q[:, ::2].to(torch.uint8) | (q[:, 1::2].to(torch.uint8) << 4)).contiguous()
        scale = scale.to(torch.float16).contiguous()
        if not torch.isfinite(scale).all():
            raise ValueError(f"scale is not finite in {int((~torch.isfinite(scale)).sum())} of {scale.numel()} rows")
        if zero is not None:
            _check_range("zero", zero, 0, 15)
            zero = zero.to(torch.uint8).contiguous()
        if group_scale is not None and group_zero is not None:
            _check_range("group_scale", group_scale, 1, 255)
            _check_range("group_zero", group_zero, 0, 255)
            group_scale, group_zero = (t.to(torch.uint8).contiguous() for t in (group_scale, group_zero))
        weight = cls(qweight, scale, group_scale, group_zero, zero)
        weight.check()
        return weight

    def check(self) -> None:
        """Refuse tensors that are no weight.

        Raises:
            ValueError: shapes disagree, both forms or none are there, or int8 overflows; with the row.
        """
        if self.is_arranged:
            return self.plain().check()
        rows, columns = self.qweight.shape[0], 2 * self.qweight.shape[1]
        if self.scale.shape != (rows,):
            raise ValueError(f"scale is {tuple(self.scale.shape)}, expected ({rows},)")
        grouped = (self.group_scale is not None, self.group_zero is not None)
        if len(set(grouped)) == 2 or grouped[0] == (self.zero is not None):
            raise ValueError("a weight has group_scale and group_zero, or zero, and not both")
        if self.zero is not None and self.zero.shape != (rows,):
            raise ValueError(f"zero is {tuple(self.zero.shape)}, expected ({rows},)")
        if self.group_scale is None or self.group_zero is None:
            return
        groups = self.group_scale.shape[-1]
        if self.group_scale.shape != (rows, groups) or self.group_zero.shape != (rows, groups):
            raise ValueError(
                f"group_scale is {tuple(self.group_scale.shape)} and group_zero {tuple(self.group_zero.shape)}, "
                f"expected both ({rows}, K / group size)"
            )
        if not groups or columns % groups or columns // groups % 2:
            raise ValueError(f"K = {columns} does not split into {groups} groups of even size")
        low, high = self._span()
        if low.numel() and (low.min() < -128 or high.max() > 127):
            row = int(((low < -128) | (high > 127)).any(-1).nonzero()[0])
            raise ValueError(f"row {row} spans {int(low[row].min())}..{int(high[row].max())}, which is no int8")

    def _span(self) -> tuple[Tensor, Tensor]:
        """The least and the largest int8 value of every group, int32 ``(N, G)``, as they would be without overflow."""
        assert self.group_scale is not None
        assert self.group_zero is not None
        integers = self.integers().unflatten(1, (self.group_scale.shape[1], -1))
        scale, zero = self.group_scale.int(), self.group_zero.int()
        return integers.amin(-1).int() * scale - zero, integers.amax(-1).int() * scale - zero

    @property
    def is_arranged(self) -> bool:
        return self.qweight.dim() == 4

    def arranged(self) -> Self:
        """The weight in the order in which a CPU multiplies 4 bits as they are; it takes the same memory.

        ``qweight`` is then uint8 ``(N / 16, K / 8, 16, 4)``, groups are ``(N / 32, K / g, 32)``, N is rounded up to a
        multiple of 32 (:mod:`.cpu_panels`). Itself where no kernel takes that: without numba, on another kind of
        processor or device, for K or groups that are not multiples of 8, and for weights from elsewhere that do not
        fit :attr:`fits_bytes`.
        """
        if self.is_arranged or self.device.type != "cpu" or byte_set() is None:
            return self
        if not self.qweight.numel() or self.group_size % 8 or not self.fits_bytes:
            return self
        words, groups = cpu_panels.arrange_nibbles(self.qweight), (self.group_scale, self.group_zero)
        group_scale, group_zero = (None if each is None else cpu_panels.arrange_groups(each) for each in groups)
        return type(self)(words, self.scale.contiguous(), group_scale, group_zero, self.zero)

    def plain(self) -> Self:
        """The weight in the layout of the attributes: what :meth:`arranged` was called on."""
        if not self.is_arranged:
            return self
        n, groups = self.scale.shape[0], (self.group_scale, self.group_zero)
        group_scale, group_zero = (None if each is None else cpu_panels.groups_of(each, n) for each in groups)
        return type(self)(cpu_panels.nibbles_of(self.qweight, n), self.scale, group_scale, group_zero, self.zero)

    def integers(self) -> Tensor:
        """``q`` as uint8 ``(N, K)``."""
        if self.is_arranged:
            return self.plain().integers()
        return torch.stack((self.qweight & 15, self.qweight >> 4), -1).flatten(1)

    def int8(self) -> Tensor:
        """The integers that the products are made of, int8 ``(N, K)``, contiguous."""
        if self.is_arranged:
            return self.plain().int8()
        q = self.integers()
        if self.group_scale is None or self.group_zero is None:
            assert self.zero is not None
            return (q.to(torch.int16) - self.zero.unsqueeze(-1)).to(torch.int8)
        groups = q.unflatten(1, (self.group_scale.shape[1], -1)).to(torch.int16)
        expanded: Tensor = groups * self.group_scale.unsqueeze(-1) - self.group_zero.unsqueeze(-1)
        return expanded.to(torch.int8).view_as(q)

    def values(self, dtype: torch.dtype) -> Tensor:
        """``W`` ``(N, K)``."""
        return self.int8().to(dtype) * self.scale.to(dtype).unsqueeze(-1)

    @property
    def fits_bytes(self) -> bool:
        """Whether ``q * group_scale + (128 - group_zero)`` stays within a byte, which lets a GPU expand four at once.

        Quantizers of this package see to it; checkpoints from elsewhere may not, and take a slower kernel.
        """
        if self.group_zero is None or self.is_arranged:
            return True
        _, high = self._span()
        return not self.group_zero.numel() or bool(self.group_zero.max() <= 128 and high.max() <= 127)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As the constructor and the ops take them."""
        return self.qweight, self.scale, self.group_scale, self.group_zero, self.zero

    def to(self, device: torch.device | str) -> Self:
        """The weight on another device."""
        if torch.device(device).type != "cpu" and self.is_arranged:
            return self.plain().to(device)
        qweight, scale, *rest = self.tensors
        moved = [None if tensor is None else tensor.to(device) for tensor in rest]
        return type(self)(qweight.to(device), scale.to(device), *moved)

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] * (8 if self.is_arranged else 2)

    @property
    def group_size(self) -> int:
        """Columns that share a zero point; K where that is the whole row."""
        return self.in_features // (1 if self.group_scale is None else self.group_scale.shape[1])  # in either order

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the packed integers: hosts ask a layer's weight whether it is floating point."""
        return self.qweight.dtype


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel() and (values.min() < low or values.max() > high):
        raise ValueError(f"{name} spans {values.min().item()}..{values.max().item()}, expected {low}..{high}")
