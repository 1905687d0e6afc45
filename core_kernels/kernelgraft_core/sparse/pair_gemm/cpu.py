"""Products of pairs on a CPU: merged, then by the kernels of sparse convolution."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse.conv.cpu import TILE_ROWS, Pairs, multiply, sum_outer
from kernelgraft_core.sparse.grids import starts_of

from . import reference
from .merging import Merged, merge

TILE_NUMBERS = 1 << 17  # float32 of a tile of outputs: half of a second-level cache
FEW_PAIRS = 24  # of a relation in a tile: below, its matrix is loaded for too little


@dataclass(frozen=True)
class _Plan:
    merged: Merged
    pairs: Pairs


_plans: Derived[dict[tuple[int, ...], _Plan]] = Derived()


def pair_gemm(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, rows: int
) -> Tensor:
    channels = weight.shape[1] * weight.shape[3]
    if not (rows and len(inputs) and weight.numel()):
        return x.new_zeros((rows, channels))
    plan = _plan(inputs, outputs, starts, scale, (len(x), rows), channels)
    return multiply(plan.merged.rows(x), weight, None, plan.pairs, rows).to(x.dtype)


def pair_gemm_wgrad(
    x: Tensor, grad: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, groups: int
) -> Tensor:
    if not (len(inputs) and x.shape[1] and grad.shape[1]):
        return reference.pair_gemm_wgrad(x, grad, inputs, outputs, starts, scale, groups)
    plan = _plan(inputs, outputs, starts, scale, (len(x), len(grad)), grad.shape[1])
    return sum_outer(plan.merged.rows(x), grad, plan.pairs, groups).to(x.dtype)


def _plan(
    inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, sizes: tuple[int, int], channels: int
) -> _Plan:
    """Made once for a graph."""
    taps, tile_rows = len(starts) - 1, TILE_ROWS
    while 2 * tile_rows * channels <= TILE_NUMBERS and len(inputs) * tile_rows < FEW_PAIRS * taps * sizes[1]:
        tile_rows *= 2
    known = _plans.of((inputs, outputs, starts, scale), dict)
    key = *sizes, tile_rows
    if key not in known:
        merged = merge(inputs, outputs, starts, scale, sizes, tile_rows)
        tiles = -(-sizes[1] // tile_rows)
        counts = torch.bincount(merged.outputs // tile_rows * taps + merged.relations, minlength=tiles * taps)
        bounds = starts_of(counts)
        pairs = Pairs(taps, tiles, tile_rows, merged.inputs.int(), merged.outputs.int(), bounds)
        known[key] = _Plan(merged, pairs)
    return known[key]


def supports_pair_gemm(x: Tensor, *_: object) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_pair_gemm_wgrad = supports_pair_gemm
