"""Sparse convolution on a CPU by the kernels of :mod:`.cpu_kernels`, which needs numba.

Output rows are done in tiles that stay in the second-level cache, tap by tap; rows of the input are read where they
are.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.runtime.threads import Launch, Phase, available_threads, parallel_for
from kernelgraft_core.sparse.grids import starts_of
from kernelgraft_core.sparse.maps.exchanged import exchanged

from . import reference
from .dataflow import ConvConfig, Dataflow

if TYPE_CHECKING:
    from .cpu_tile import FloatSet

TILE_ROWS = 256  # of a tile
PART_TILES = 8  # tiles whose share of a weight's gradient is summed together, at least


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of rows by tile of ``tile_rows`` outputs, in there by tap; those of a tap have different outputs."""

    taps: int
    tiles: int
    tile_rows: int
    inputs: Tensor
    outputs: Tensor
    starts: Tensor
    _bounds: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def largest(self) -> int:
        """Of ``inputs``, -1 where there are none."""
        return int(self.inputs.max()) if len(self.inputs) else -1

    def balanced(self, parts: int, threads: int) -> tuple[int, ...]:
        """Numbers of parts that cut all of them into ``threads`` shares of about as many pairs.

        The tiles are in ``parts`` runs; a scan is denser at one end than at the other.
        """
        known = self._bounds.get((parts, threads))
        if known is None:
            before = self.starts[:: self.taps][torch.arange(parts + 1) * self.tiles // parts]
            share = before[-1] * torch.arange(1, threads) / threads
            inner = torch.searchsorted(before.double(), share.double()).tolist()
            known = self._bounds[parts, threads] = (0, *(min(each, parts) for each in inner), parts)
        return known


_pairs: Derived[Pairs] = Derived()


def sparse_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, symmetric: bool, activation: str, dataflow: str
) -> Tensor:
    return _convolve(x, weight, bias, neighbors, relu=activation == "relu")


def sparse_conv_dgrad(
    grad: Tensor, weight: Tensor, neighbors: Tensor, rows: int, symmetric: bool, dataflow: str
) -> Tensor:
    swapped = weight.transpose(2, 3)
    if symmetric:
        return _convolve(grad, swapped, None, neighbors, backwards=True)
    return _convolve(grad, swapped, None, exchanged(neighbors, rows))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, backwards: bool = False, relu: bool = False
) -> Tensor:
    """``backwards``: the last tap of the weight belongs to the first of the map."""
    if not (len(neighbors) and weight.shape[2] and weight.shape[3]):
        return reference.sparse_conv(x, weight, bias, neighbors, activation="relu" if relu else "none")
    pairs = _pairs.of((neighbors,), lambda: make_pairs(neighbors))
    return multiply(x, weight, bias, pairs, len(neighbors), backwards, relu)


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Pairs,
    rows: int,
    backwards: bool = False,
    relu: bool = False,
) -> Tensor:
    """The sums of the products of pairs, ``(rows, C_out)``; neither rows nor channels are 0."""
    _check_rows(pairs, x)
    _, groups, cin, cout = weight.shape
    known = _set_for(x.dtype)
    padded = -(-cout // known.lanes) * known.lanes
    if known.pairs:
        single, weights, cin = *_paired(x, weight, padded), -(-cin // 2)
    else:
        single, weights = x.float().contiguous(), _padded(weight.float(), padded)
    added = None if bias is None else _padded(bias.float().view(groups, cout), padded)
    out = torch.empty(rows, groups * padded)
    _run(
        _forward_kernel(known), pairs, pairs.tiles,
        pairs.tile_rows, rows, pairs.taps, pairs.inputs.data_ptr(), pairs.outputs.data_ptr(),
        pairs.starts.data_ptr(), int(backwards), groups, cin, padded, single.data_ptr(), weights.data_ptr(),
        0 if added is None else added.data_ptr(), out.data_ptr(), 0, 0, pairs.tiles, int(relu),
    )  # fmt: skip
    whole: Tensor = out.unflatten(1, (groups, padded))[..., :cout].to(x.dtype).contiguous()
    return whole.flatten(1)


def sparse_conv_wgrad(x: Tensor, grad: Tensor, neighbors: Tensor, groups: int, dataflow: str) -> Tensor:
    if not (len(neighbors) and x.shape[1] and grad.shape[1]):
        return reference.sparse_conv_wgrad(x, grad, neighbors, groups)
    return sum_outer(x, grad, _pairs.of((neighbors,), lambda: make_pairs(neighbors)), groups)


def sum_outer(x: Tensor, grad: Tensor, pairs: Pairs, groups: int) -> Tensor:
    """The gradient of a weight, ``(K, G, C_in / G, C_out / G)``; neither rows nor channels are 0."""
    _check_rows(pairs, x)
    cin, cout = x.shape[1] // groups, grad.shape[1] // groups
    padded = -(-cout // float_set().lanes) * float_set().lanes
    # What is summed together depends on the number of tiles alone, so that threads do not change the result.
    parts = max(1, min(64, pairs.tiles // PART_TILES))
    single, grads = x.float().contiguous(), _padded(grad.float().unflatten(1, (groups, cout)), padded)
    partial = torch.empty(parts, pairs.taps, groups, cin, padded)
    _run(
        _weight_kernel(), pairs, parts,
        pairs.tile_rows, len(grad), pairs.taps, pairs.inputs.data_ptr(), pairs.outputs.data_ptr(),
        pairs.starts.data_ptr(), 0, groups, cin, padded, single.data_ptr(), 0, 0, grads.data_ptr(),
        partial.data_ptr(), parts, pairs.tiles, 0,
    )  # fmt: skip
    out: Tensor = partial.sum(0)[..., :cout].to(x.dtype)
    return out.contiguous()


def make_pairs(neighbors: Tensor) -> Pairs:
    """Sort a kernel map ``(N_out, K)`` by tile and tap."""
    from . import cpu_kernels as kernels

    rows, taps = neighbors.shape
    tiles = -(-rows // TILE_ROWS)
    neighbors = neighbors.contiguous()
    counts = torch.empty(tiles * taps, dtype=torch.int64)
    told = TILE_ROWS, rows, taps, neighbors.data_ptr(), counts.data_ptr()
    if tiles:
        Launch(Phase(kernels.count_pairs.address, tiles, 4))(*told, 0, 0, 0)
    starts = starts_of(counts)
    inputs, outputs = (torch.empty(int(starts[-1]), dtype=torch.int32) for _ in range(2))
    if tiles:
        Launch(Phase(kernels.fill_pairs.address, tiles, 4))(
            *told, starts.data_ptr(), inputs.data_ptr(), outputs.data_ptr()
        )
    return Pairs(taps, tiles, TILE_ROWS, inputs, outputs, starts)


def _check_rows(pairs: Pairs, x: Tensor) -> None:
    """The kernels read where they are told to."""
    if pairs.largest >= len(x):
        raise ValueError(f"neighbors names row {pairs.largest} of x, which has {len(x)}")


def supports_sparse_conv(x: Tensor, *args: object) -> str | None:
    # What a gradient is told, one dataflow, reads as that of all three directions.
    return _unsupported(x, ConvConfig.parse(str(args[-1])).forward)


supports_sparse_conv_dgrad = supports_sparse_conv_wgrad = supports_sparse_conv


def _unsupported(x: Tensor, dataflow: Dataflow) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is left to the other backends"
    if dataflow.kind not in ("auto", "implicit_gemm"):
        return f"dataflow is {dataflow}"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


def _padded(values: Tensor, last: int) -> Tensor:
    """The last axis filled up with zeros, contiguous."""
    return torch.nn.functional.pad(values, (0, last - values.shape[-1])).contiguous()


def _paired(x: Tensor, weight: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """bfloat16 features with an even number of channels in a group, and a weight ``(K, G, C_in / 2, last, 2)``."""
    _, groups, cin, cout = weight.shape
    odd = cin % 2
    if odd:
        x = _padded(x.unflatten(1, (groups, cin)), cin + 1)
    weight = torch.nn.functional.pad(weight, (0, last - cout, 0, odd))
    return x.contiguous(), weight.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()


def _run(kernel: int, pairs: Pairs, parts: int, *numbers: int) -> None:
    """A kernel over ``parts`` runs of tiles, on all threads."""
    told = (ctypes.c_int64 * (1 + len(numbers)))(0, *numbers)
    threads = min(available_threads(), parts)
    bounds = pairs.balanced(parts, threads) if threads > 1 else None
    parallel_for(kernel, told, parts, bounds=bounds)


@functools.cache
def _forward_kernel(known: FloatSet) -> int:
    from . import cpu_kernels as kernels

    address: int = kernels.forward_kernel(known).address
    return address


@functools.cache
def _weight_kernel() -> int:
    from . import cpu_kernels as kernels

    address: int = kernels.weight_kernel(float_set()).address
    return address


@functools.cache
def _set_for(dtype: torch.dtype) -> FloatSet:
    """What outputs are computed with: half types go through float32, but for bfloat16 where a processor has it."""
    from kernelgraft_core.runtime.cpu_vectors import BFLOAT, is_there

    from .cpu_tile import BFLOAT_SET

    return BFLOAT_SET if dtype == torch.bfloat16 and is_there(BFLOAT) else float_set()


@functools.cache
def float_set() -> FloatSet:
    from kernelgraft_core.runtime.cpu_vectors import instruction_set

    from .cpu_tile import FLOAT_SETS

    name = {"avx512vnni": "avx512", "avxvnni": "avx2"}.get(instruction_set().name, instruction_set().name)
    return next(known for known in FLOAT_SETS if known.isa.name == name)
