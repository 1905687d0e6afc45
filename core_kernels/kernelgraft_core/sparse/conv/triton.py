"""Sparse convolution on a GPU: see :mod:`.triton_kernels`.

What is derived of a kernel map, tiles packed tap by tap among it, is made at its first use and kept beside the map, so
that all layers that share a map share it too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
from torch import Tensor

from kernelgraft_core.runtime.device import arch_key
from kernelgraft_core.runtime.plans import PLANS
from kernelgraft_core.runtime.timing import measure_us
from kernelgraft_core.sparse.maps.exchanged import exchanged

from . import reference
from .dataflow import ConvConfig, Dataflow
from .packing import TapPairs, packed_map, tap_pairs
from .triton_kernels import fetch_on_demand_kernel, implicit_gemm_kernel, sum_parts_kernel, weight_gradient_kernel
from .triton_tiles import OP, VERSION, Product, Tile, candidates, choose

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DEFAULT = Dataflow("implicit_gemm", 1)
SUM_BLOCK = 1024
MOST_PARTS = 32  # that the pairs of a tap are summed in, for the gradient of a weight


def sparse_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, symmetric: bool, activation: str, dataflow: str
) -> Tensor:
    chosen = ConvConfig.parse(dataflow).forward
    return _convolve("forward", chosen, x, weight, neighbors, False, bias, activation == "relu")


def sparse_conv_dgrad(
    grad: Tensor, weight: Tensor, neighbors: Tensor, rows: int, symmetric: bool, dataflow: str
) -> Tensor:
    known = neighbors if symmetric else exchanged(neighbors, rows)
    return _convolve("dgrad", Dataflow.parse(dataflow), grad, weight.transpose(2, 3), known, symmetric, None, False)


def sparse_conv_wgrad(x: Tensor, grad: Tensor, neighbors: Tensor, groups: int, dataflow: str) -> Tensor:
    taps, cin, cout = neighbors.shape[1], x.shape[1] // groups, grad.shape[1] // groups
    found = torch.empty((taps, groups, cin, cout), dtype=x.dtype, device=x.device)
    if not found.numel():
        return found
    x, grad = x.contiguous(), grad.contiguous()
    product = product_of("wgrad", Dataflow(), len(neighbors), cin, cout, x)
    parts = max(1, min(MOST_PARTS, len(neighbors) // 1024))  # of the number of rows alone: the sums do not change
    run_tile(product, functools.partial(weight_gradient, x, grad, tap_pairs(neighbors), parts, found))
    return found


def _convolve(
    direction: str,
    dataflow: Dataflow,
    x: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    backwards: bool,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """``backwards``: the last tap of the weight belongs to the first of the map."""
    _, groups, cin, cout = weight.shape
    out = torch.empty((len(neighbors), groups * cout), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if not (x.numel() and weight.numel()):
        return reference.sparse_conv(x, weight, bias, neighbors, activation="relu" if relu else "none")
    dataflow = DEFAULT if dataflow.kind == "auto" else dataflow
    product = product_of(direction, dataflow, len(neighbors), cin, cout, x)
    run = _implicit_gemm if dataflow.kind == "implicit_gemm" else _fetch_on_demand
    added = None if bias is None else bias.contiguous()
    run_tile(product, functools.partial(run, dataflow, x.contiguous(), weight, neighbors, backwards, added, relu, out))
    return out


def run_tile(product: Product, run: Callable[[Tile], None]) -> None:
    """By a stored plan or a rule; measures while tuning."""
    if PLANS.should_tune(OP, VERSION, product.arch, product.shape):
        runs = {name: (asdict(tile), functools.partial(run, tile)) for name, tile in candidates(product).items()}
        PLANS.tune(OP, VERSION, product.arch, product.shape, runs, measure_us)
    run(choose(product))


def _implicit_gemm(
    dataflow: Dataflow,
    x: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    backwards: bool,
    bias: Tensor | None,
    relu: bool,
    out: Tensor,
    tile: Tile,
) -> None:
    _, groups, cin, cout = weight.shape
    known = packed_map(neighbors, dataflow.splits, tile.rows)
    split = known.splits > 1
    target = torch.empty((known.splits, *out.shape), dtype=torch.float32, device=x.device) if split else out
    first, strides = _taps_of(weight, backwards)
    with torch.cuda.device_of(x):
        implicit_gemm_kernel[known.tiles * known.splits, triton.cdiv(cout, tile.columns), groups](
            x, first, x if bias is None else bias, known.entries, known.taps, known.starts, known.order, target,
            len(neighbors), known.tiles, cin, cout, x.shape[1], *strides,
            **constants(tile, cin, cout, x.dtype), SPLIT=split, HAS_BIAS=bias is not None and not split,
            RELU=relu and not split, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if split:
            sum_parts(target, bias, relu, out)


def _fetch_on_demand(
    dataflow: Dataflow,
    x: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    backwards: bool,
    bias: Tensor | None,
    relu: bool,
    out: Tensor,
    tile: Tile,
) -> None:
    taps, groups, cin, cout = weight.shape
    pairs = tap_pairs(neighbors)
    target = torch.zeros(out.shape, dtype=torch.float32, device=x.device)
    first, strides = _taps_of(weight, backwards)
    tiles, columns = triton.cdiv(len(neighbors), tile.rows), triton.cdiv(cout, tile.columns)
    atomic = dataflow.kind == "fetch_on_demand_atomic"
    with torch.cuda.device_of(x):
        # A launch for each tap: no two pairs of one tap have the same output, and the order of additions is settled.
        for tap in range(1 if atomic else taps):
            fetch_on_demand_kernel[tiles * columns * (taps if atomic else 1), groups](
                x, first, pairs.inputs, pairs.outputs, pairs.starts, target,
                tap, tiles, cin, cout, x.shape[1], *strides, **constants(tile, cin, cout, x.dtype), ALL=atomic,
                ATOMIC=atomic, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        sum_parts(target.unsqueeze(0), bias, relu, out)


def weight_gradient(x: Tensor, grad: Tensor, pairs: TapPairs, parts: int, out: Tensor, tile: Tile) -> None:
    """Write the gradient of a weight to ``out``; the pairs of a tap are summed in ``parts``."""
    taps, groups, cin, cout = out.shape
    target = torch.empty((parts, *out.shape), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(cin, tile.rows) * triton.cdiv(cout, tile.columns)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[taps * groups, tiles, parts](
            x, grad, pairs.inputs, pairs.outputs, pairs.starts, target,
            groups, cin, cout, x.shape[1], grad.shape[1], **gradient_constants(tile, cin, cout, x.dtype), PARTS=parts,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        sum_parts(target, None, False, out)


def sum_parts(parts: Tensor, bias: Tensor | None, relu: bool, out: Tensor) -> None:
    """Write the sums of float32 ``parts (P, ...)`` to ``out (...)``."""
    sum_parts_kernel[triton.cdiv(out.numel(), SUM_BLOCK),](
        parts, parts if bias is None else bias, out, out.numel(), out.shape[-1],
        PARTS=len(parts), HAS_BIAS=bias is not None, RELU=relu, BLOCK=SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def constants(tile: Tile, cin: int, cout: int, dtype: torch.dtype) -> dict[str, int | bool | str]:
    """The constant arguments that follow from a tile and the channels of a group."""
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STEPS": triton.cdiv(cin, tile.depth),
        "WHOLE": cin % tile.depth == 0 and cout % tile.columns == 0, "PRECISION": precision(dtype),
        "STAGES": tile.stages,
    }  # fmt: skip


def gradient_constants(tile: Tile, cin: int, cout: int, dtype: torch.dtype) -> dict[str, int | bool | str]:
    """The same for the gradient of a weight."""
    return {
        "BI": tile.rows, "BO": tile.columns, "BP": tile.depth,
        "WHOLE": cin % tile.rows == 0 and cout % tile.columns == 0, "PRECISION": precision(dtype),
        "STAGES": tile.stages,
    }  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three steps of TF32, which lose nothing, unless torch is told that one will do."""
    if dtype != torch.float32 or INTERPRETED:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _taps_of(weight: Tensor, backwards: bool) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Where the tap of the map's first begins, and how far it is to the next tap, group, input and output channel."""
    tap, group, inner, outer = weight.stride()
    return (weight[-1], (-tap, group, inner, outer)) if backwards else (weight, (tap, group, inner, outer))


def product_of(direction: str, dataflow: Dataflow, rows: int, cin: int, cout: int, x: Tensor) -> Product:
    """What a tile is chosen for."""
    return Product.of(direction, str(dataflow), rows, cin, cout, x.element_size(), arch_key(x.device))


def supports_sparse_conv(x: Tensor, *args: object) -> str | None:
    # What a gradient is told, one dataflow, reads as that of all three directions.
    return unsupported(x, ConvConfig.parse(str(args[-1])).forward)


supports_sparse_conv_dgrad = supports_sparse_conv_wgrad = supports_sparse_conv


def unsupported(x: Tensor, dataflow: Dataflow) -> str | None:
    """Why nothing here computes on numbers and a device like those of ``x``, or None."""
    if dataflow.kind == "gather_scatter":
        return f"dataflow is {dataflow}"
    if x.dtype not in FLOATS:
        return f"{x.dtype} is left to the other backends"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "compute capability is below 8.0"
    return None
