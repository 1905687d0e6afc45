"""From a weight and the moments of its input to integers: grids, then rounding. What AWQ, GPTQ and QoQ share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import Tensor

from kernelgraft_core.quant.gptq import gptq_round
from kernelgraft_core.quant.moments import group_moments

from .clip import Span, search_grid
from .refine import SearchGrid, refine_grid

G = TypeVar("G", bound=SearchGrid)
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class GridSearch:
    """How integers are found.

    Attributes:
        clip_steps: steps of the clip search (:mod:`.clip`); 0 keeps the whole range of every group.
        refine_sweeps: how often grids are made to fit each other (:mod:`.refine`), where they are searched at all.
        rounding: ``"nearest"``, or ``"gptq"`` (:mod:`~kernelgraft_core.quant.gptq.solver`), and its ``damping``.

    Raises:
        ValueError: a number is negative or ``rounding`` is unknown.
    """

    clip_steps: int = 10
    refine_sweeps: int = 1
    rounding: Rounding = "nearest"
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("clip_steps", "refine_sweeps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding {self.rounding!r}; there are {', '.join(get_args(Rounding))}")

    def run(self, groups: Tensor, moments: Tensor, span: Span[G], *, clip: bool = True) -> tuple[G, Tensor]:
        """The grid and the integers ``(N, G, g)`` of weights ``(N, G, g)`` whose input has moments ``(K, K)``.

        Args:
            span: gives the grid for a range.
            clip: whether the grid is searched; otherwise it spans the whole range of each group.
        """
        if clip and self.clip_steps:
            grid = search_grid(groups, group_moments(moments, groups.shape[-1]), span, steps=self.clip_steps)
            grid = refine_grid(groups, moments, grid, sweeps=self.refine_sweeps)
        else:
            grid = span(groups.amin(-1), groups.amax(-1))
        if self.rounding == "gptq":
            return grid, gptq_round(groups.flatten(1), moments, grid, damping=self.damping).view_as(groups)
        return grid, grid.round(groups)
