"""Products of pairs on a GPU: merged, multiplied relation by relation, and summed by output in a settled order."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse.conv.dataflow import Dataflow
from kernelgraft_core.sparse.conv.packing import TapPairs
from kernelgraft_core.sparse.conv.triton import constants, product_of, run_tile, weight_gradient
from kernelgraft_core.sparse.conv.triton import unsupported as unsupported_numbers
from kernelgraft_core.sparse.conv.triton_kernels import fetch_on_demand_kernel
from kernelgraft_core.sparse.conv.triton_tiles import Tile
from kernelgraft_core.sparse.grids import starts_of

from .merging import Merged, merge

PAIRS = Dataflow("fetch_on_demand")


@dataclass(frozen=True)
class _Plan:
    """Merged pairs, where each relation begins, their places, and the order and number of those of each output."""

    merged: Merged
    pairs: TapPairs
    places: Tensor
    longest: int
    by_output: Tensor
    lengths: Tensor


_plans: Derived[dict[tuple[int, int], _Plan]] = Derived()


def pair_gemm(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, rows: int
) -> Tensor:
    taps, groups, cin, cout = weight.shape
    if not (rows and len(inputs) and weight.numel()):
        return x.new_zeros((rows, groups * cout))
    plan = _plan(inputs, outputs, starts, scale, (len(x), rows))
    # Sums of many rows may leave the range of a half type; float32 they are, and so is what multiplies them.
    values = plan.merged.rows(x).contiguous()
    weight = weight.to(values.dtype)
    products = torch.zeros((len(plan.places), groups * cout), dtype=torch.float32, device=x.device)
    chosen = product_of("forward", PAIRS, rows, cin, cout, values)

    def launch(tile: Tile) -> None:
        tiles, columns = triton.cdiv(plan.longest, tile.rows), triton.cdiv(cout, tile.columns)
        with torch.cuda.device_of(x):
            fetch_on_demand_kernel[tiles * columns * taps, groups](
                values, weight, plan.pairs.inputs, plan.places, plan.pairs.starts, products,
                0, tiles, cin, cout, values.shape[1], *weight.stride(), **constants(tile, cin, cout, values.dtype),
                ALL=True, ATOMIC=False, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

    run_tile(chosen, launch)
    ordered = products[plan.by_output]
    summed: Tensor = torch.segment_reduce(ordered, "sum", lengths=plan.lengths, axis=0, initial=0)
    return summed.to(x.dtype)


def pair_gemm_wgrad(
    x: Tensor, grad: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, groups: int
) -> Tensor:
    taps, cin, cout = len(starts) - 1, x.shape[1] // groups, grad.shape[1] // groups
    found = torch.zeros((taps, groups, cin, cout), dtype=x.dtype, device=x.device)
    if not (len(inputs) and found.numel()):
        return found
    plan = _plan(inputs, outputs, starts, scale, (len(x), len(grad)))
    values = plan.merged.rows(x).contiguous()
    grad = grad.to(values.dtype).contiguous()
    run_tile(
        product_of("wgrad", PAIRS, len(grad), cin, cout, values),
        functools.partial(weight_gradient, values, grad, plan.pairs, 1, found),
    )
    return found


def _plan(inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, sizes: tuple[int, int]) -> _Plan:
    """Made once for a graph."""
    known = _plans.of((inputs, outputs, starts, scale), dict)
    if sizes not in known:
        merged = merge(inputs, outputs, starts, scale, sizes, max(1, sizes[1]))
        counts = torch.bincount(merged.relations, minlength=len(starts) - 1)
        bounds = starts_of(counts)
        lengths = torch.bincount(merged.outputs, minlength=sizes[1])
        places = torch.arange(len(merged.outputs), dtype=torch.int32, device=inputs.device)
        known[sizes] = _Plan(
            merged, TapPairs(merged.inputs.int(), merged.outputs.int(), bounds.int()), places, int(counts.max()),
            merged.outputs.argsort(stable=True), lengths,
        )  # fmt: skip
    return known[sizes]


def supports_pair_gemm(x: Tensor, *_: object) -> str | None:
    return unsupported_numbers(x, PAIRS)


supports_pair_gemm_wgrad = supports_pair_gemm
