"""Weights of linear layers in the order that the CPU kernels read them, made once; and which instructions there are."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import DerivedOfValues

if TYPE_CHECKING:
    from .cpu_tile import TileSet

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Panels:
    """A linear layer for a set of tiles.

    Attributes:
        weight: panel after panel of output channels, each ``(depth, panel)`` float32, or pairs of bfloat16.
        bias: float32, of all columns.
        depth: input channels, or pairs of them.
        columns: output channels filled up to whole panels.
    """

    weight: Tensor
    bias: Tensor
    depth: int
    columns: int


_panels: DerivedOfValues[dict[tuple[int, int, int, bool], Panels]] = DerivedOfValues()


def panels_of(weight: Tensor, bias: Tensor | None, known: TileSet, first: int = 0, last: int | None = None) -> Panels:
    """Rows ``first`` to ``last`` of a weight ``(out, in)``, all of them without."""
    last = len(weight) if last is None else last
    made = _panels.of((weight, bias), dict)
    key = first, last, known.panel, known.pairs
    if key not in made:
        made[key] = _pack(weight.detach()[first:last], None if bias is None else bias.detach()[first:last], known)
    return made[key]


def _pack(weight: Tensor, bias: Tensor | None, known: TileSet) -> Panels:
    out, channels = weight.shape
    columns, pair = -(-out // known.panel) * known.panel, 2 if known.pairs else 1
    depth = -(-channels // pair)
    padded = torch.zeros((columns, depth * pair), dtype=torch.bfloat16 if known.pairs else torch.float32)
    padded[:out, :channels] = weight
    packed = padded.view(-1, known.panel, depth, pair).transpose(1, 2).contiguous()
    added = torch.zeros(columns)
    if bias is not None:
        added[:out] = bias
    return Panels(packed, added, depth, columns)


def unsupported(x: Tensor) -> str | None:
    """Why the CPU kernels cannot compute with ``x``, or None."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} is left to the other backends"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


@functools.cache
def float_set() -> TileSet:
    """The best tiles for float32 here."""
    from kernelgraft_core.runtime.cpu_vectors import instruction_set

    from .cpu_tile import TILE_SETS

    name = {"avx512vnni": "avx512", "avxvnni": "avx2"}.get(instruction_set().name, instruction_set().name)
    return next(known for known in TILE_SETS if known.isa.name == name)


@functools.cache
def set_for(dtype: torch.dtype) -> TileSet:
    """Half types go through float32, but for bfloat16 where a processor has products of it."""
    from kernelgraft_core.runtime.cpu_vectors import BFLOAT, is_there

    from .cpu_tile import BFLOAT_SET

    return BFLOAT_SET if dtype == torch.bfloat16 and is_there(BFLOAT) else float_set()
