"""Products of pairs on a GPU: merged, multiplied relation by relation, and summed by output in a settled order."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse.conv.dataflow import Dataflow
from kernelgraft_core.sparse.conv.triton import constants, gradient_constants, product_of, run_tile, sum_parts
from kernelgraft_core.sparse.conv.triton import unsupported as unsupported_numbers
from kernelgraft_core.sparse.conv.triton_kernels import fetch_on_demand_kernel, weight_gradient_kernel
from kernelgraft_core.sparse.conv.triton_tiles import Tile

from .merging import Merged, merge

PAIRS = Dataflow("fetch_on_demand")


@dataclass(frozen=True)
class _Plan:
    """Merged pairs, where each relation begins, their places, and the order and number of those of each output."""

    merged: Merged
    inputs: Tensor
    outputs: Tensor
    starts: Tensor
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
                values, weight, plan.inputs, plan.places, plan.starts, products,
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
        functools.partial(_sum_outer, values, grad, plan, found),
    )
    return found


def _sum_outer(x: Tensor, grad: Tensor, plan: _Plan, out: Tensor, tile: Tile) -> None:
    taps, groups, cin, cout = out.shape
    target = torch.empty((1, *out.shape), dtype=torch.float32, device=x.device)  # many relations fill a GPU
    tiles = triton.cdiv(cin, tile.rows) * triton.cdiv(cout, tile.columns)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[taps * groups, tiles, 1](
            x, grad, plan.inputs, plan.outputs, plan.starts, target, groups, cin, cout, x.shape[1], grad.shape[1],
            **gradient_constants(tile, cin, cout, x.dtype), PARTS=1, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        sum_parts(target, None, False, out)


def _plan(inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, sizes: tuple[int, int]) -> _Plan:
    """Made once for a graph."""
    known = _plans.of((inputs, outputs, starts, scale), dict)
    if sizes not in known:
        merged = merge(inputs, outputs, starts, scale, sizes, max(1, sizes[1]))
        counts = torch.bincount(merged.relations, minlength=len(starts) - 1)
        bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        lengths = torch.bincount(merged.outputs, minlength=sizes[1])
        places = torch.arange(len(merged.outputs), dtype=torch.int32, device=inputs.device)
        known[sizes] = _Plan(
            merged, merged.inputs.int(), merged.outputs.int(), bounds.int(), places, int(counts.max()),
            merged.outputs.argsort(stable=True), lengths,
        )  # fmt: skip
    return known[sizes]


def supports_pair_gemm(x: Tensor, *_: object) -> str | None:
    return unsupported_numbers(x, PAIRS)


supports_pair_gemm_wgrad = supports_pair_gemm
