"""Progressive group quantization: weights to int8 with a scale per row, and that to 4 bits with integers per group.

Section 4.1 of QServe (arXiv 2405.04532). ``W = row * int8`` and ``int8 = q * step - offset`` with ``q`` in 0..15:
kernels go from 4 bits to int8 in integers. Rows are scaled to :data:`PROTECTED`, not 127: rounding a group outwards
then stays within int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8 import W4A8Weight

LEVELS = 15
LARGEST = 127
PROTECTED = 119  # the largest range whose groups, rounded by the rule of `ProgressiveGrid.spanning`, stay within int8

# Candidates of a search around a grid, step by zero point in steps. On layers of SmolLM2 finer sets gain nothing.
STEPS = (-2, -1, 0, 1)
SHIFTS = {"pre": (-1, 0, 1), "post": (-0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75)}

ZeroForm = Literal["pre", "post"]


@dataclass(frozen=True)
class ProgressiveGrid:
    """Scales and offsets of every group.

    Attributes:
        row: ``(N, 1)``, the scale of each row, rounded to float16.
        step: ``(N, G)`` integers, at least 1.
        offset: ``(N, G)`` integers in 0..128; multiples of ``step`` where the zero point is an integer before scaling
            (``zero == "pre"``), any otherwise.
    """

    row: Tensor
    step: Tensor
    offset: Tensor
    zero: ZeroForm = "pre"

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor, row: Tensor, zero: ZeroForm) -> ProgressiveGrid:
        """The grids from ``low`` to ``high`` ``(N, G)``, zero always among them, for given row scales ``(N, 1)``."""
        low = (low / row).clamp(-PROTECTED, 0)
        high = (high / row).clamp(0, PROTECTED)
        step = ((high - low) / LEVELS).round().clamp(min=1)
        offset = (-low / step).round().clamp(0, LEVELS) * step if zero == "pre" else (-low).round()
        return cls(row, step, offset, zero)

    def round(self, groups: Tensor) -> Tensor:
        """Integers of weights ``(N, G, g)``, in their dtype; never such that int8 would overflow."""
        step, offset = self.step.unsqueeze(-1), self.offset.unsqueeze(-1)
        top = ((LARGEST + offset) / step).floor().clamp(max=LEVELS)
        return ((groups / self.row.unsqueeze(-1) + offset) / step).round_().clamp_(min=0).minimum(top)

    def reproduce(self, groups: Tensor) -> Tensor:
        """What the weights become."""
        return self.values(self.round(groups))

    def values(self, integers: Tensor) -> Tensor:
        """What integers ``(N, G, g)`` stand for."""
        return (integers * self.step.unsqueeze(-1) - self.offset.unsqueeze(-1)).mul_(self.row.unsqueeze(-1))

    def where(self, chosen: Tensor, other: ProgressiveGrid) -> ProgressiveGrid:
        """This grid for the groups that are ``chosen`` ``(N, G)``, ``other`` for the rest."""
        step, offset = torch.where(chosen, self.step, other.step), torch.where(chosen, self.offset, other.offset)
        return ProgressiveGrid(self.row, step, offset, self.zero)

    @property
    def shape(self) -> torch.Size:
        """``(N, G)``."""
        return self.step.shape

    def columns(self) -> list[ProgressiveGrid]:
        """The grids of each group by themselves."""
        parts = zip(self.step.split(1, 1), self.offset.split(1, 1), strict=True)
        return [ProgressiveGrid(self.row, step, offset, self.zero) for step, offset in parts]

    def joined(self, columns: Sequence[ProgressiveGrid]) -> ProgressiveGrid:
        """The opposite of :meth:`columns`."""
        step, offset = torch.cat([c.step for c in columns], 1), torch.cat([c.offset for c in columns], 1)
        return ProgressiveGrid(self.row, step, offset, self.zero)

    def nearby(self) -> Iterator[ProgressiveGrid]:
        """Grids that a search goes on to from here: a wider or narrower step, and a shift, around the same zero."""
        for change in STEPS:
            step = (self.step + change).clamp(min=1)
            for shift in SHIFTS[self.zero]:
                zero = self.offset / self.step + shift
                offset = ((zero * step) if self.zero == "post" else zero.round().clamp(0, LEVELS) * step).round()
                if (change, shift) != (0, 0):
                    fits = (offset >= 0) & (offset <= LARGEST + 1)
                    yield ProgressiveGrid(self.row, step, offset, self.zero).where(fits, self)

    def pack(self, integers: Tensor) -> W4A8Weight:
        """The weight of integers ``(N, G, g)``."""
        q = integers.flatten(1)
        return W4A8Weight.from_integers(q, self.row.flatten(), group_scale=self.step, group_zero=self.offset)


def row_scale(groups: Tensor) -> Tensor:
    """``(N, 1)``: what makes the largest magnitude of each row PROTECTED, as float16 stores it; 1 for rows of zeros."""
    scale = (groups.abs().amax((1, 2)) / PROTECTED).half().to(groups.dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
