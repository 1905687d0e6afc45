"""W4A8 and W8A8 as one launch of the kernels of :mod:`.cpu_kernels`, which needs numba.

This is called for every linear layer of every decoded token: what sizes alone decide is worked out once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.quant.packed.cpu_integer import KINDS
from kernelgraft_core.runtime.scratch import SCRATCH, lines
from kernelgraft_core.runtime.threads import Launch, Phase

from .cpu_panels import GROUPS, ROWS, Panels

Quantized = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Call:
    """What sizes alone decide: the launch, and offsets into scratch of sums, tiles and sums of parts, and its size."""

    launch: Launch
    padded: int
    sums: int
    tiles: int
    parts: int
    scratch: int

    def at(self, address: int) -> tuple[int, int]:
        """Where in scratch at ``address`` tiles and sums of parts are, 0 where there are none."""
        return address + self.tiles, address + self.parts if self.parts else 0


def quantize(x: Tensor) -> Quantized:
    """See :func:`~kernelgraft_core.quant.w4a8.quantize_activation`; ``x`` is contiguous, not empty, of KINDS."""
    *lead, k = x.shape
    tokens = x.numel() // k
    q = torch.empty(x.shape, dtype=torch.int8)
    scale, sums = torch.empty(lead, dtype=torch.float32), torch.empty(lead, dtype=torch.int32)
    _quantize_launch(tokens)(
        tokens, k, -(-k // 8) * 8, 0, 0, 0, 0, 0, 0, 0, x.data_ptr(), KINDS[x.dtype],
        q.data_ptr(), scale.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return q, scale, sums


def linear(x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``: contiguous ``(..., K)`` of a type in KINDS, not empty, to ``(..., N)``."""
    return _run(x, None, weight, bias, x.dtype)


def matmul(
    q: Tensor, x_scale: Tensor, x_sums: Tensor, weight: Panels, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same for activations that are quantized already; all contiguous."""
    return _run(q, (x_scale.data_ptr(), x_sums.data_ptr()), weight, bias, dtype)


def _run(
    x: Tensor, quantized: tuple[int, int] | None, weight: Panels, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Either: ``quantized`` is where scales and sums are, None where ``x`` is yet to be quantized."""
    *lead, k = x.shape
    tokens, n = x.numel() // k, weight.rows
    call = _call(tokens, n, k, weight.form, weight.groups, quantized is None)
    out = torch.empty((*lead, n), dtype=dtype)
    memory, address = SCRATCH.reserve(call.scratch)
    if quantized is None:
        activations = x.data_ptr(), KINDS[x.dtype], 0, address, address + call.sums
    else:
        activations = 0, 0, x.data_ptr(), *quantized
    biased = (0, 0) if bias is None else (bias.data_ptr(), KINDS[bias.dtype])
    call.launch(
        tokens, k, call.padded, n, *weight.addresses, *activations, *call.at(address), out.data_ptr(), KINDS[dtype],
        *biased,
    )  # fmt: skip
    del memory  # not before the launch is done
    return out


@functools.lru_cache(maxsize=4096)
def _call(tokens: int, n: int, k: int, form: int, groups: int, quantizes: bool) -> _Call:
    from . import cpu_kernels as kernels  # compiles, or loads what an earlier process compiled
    from .cpu_panels import byte_set

    known = byte_set()
    assert known is not None  # other processors take other paths
    padded = -(-k // 8) * 8
    launch = Launch(
        Phase(kernels.tile_kernel(known.tiles, quantizes).address, _tiles(tokens, known.tiles)),
        Phase(kernels.rows_kernel(known, form).address, -(-n // (ROWS * known.panels)), grain=2),
    )
    sums = lines(4 * tokens)
    parts = 2 * sums + lines(tokens * padded)
    few = form == GROUPS and tokens < kernels.EXPAND_TOKENS
    return _Call(launch, padded, sums, 2 * sums, parts if few else 0, parts + (4 * tokens * groups if few else 0))


def _tiles(tokens: int, sizes: tuple[int, ...]) -> int:
    """How many there are when the largest are taken first."""
    count = 0
    for size in sizes:
        count, tokens = count + tokens // size, tokens % size
    return count


@functools.lru_cache(maxsize=4096)
def _quantize_launch(tokens: int) -> Launch:
    from . import cpu_kernels as kernels

    return Launch(Phase(kernels.quantize_kernel().address, tokens, grain=4))
