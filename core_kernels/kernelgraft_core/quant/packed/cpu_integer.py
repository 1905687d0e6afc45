"""The packed linear layer as one launch of the integer kernels of :mod:`.cpu_kernels`, which needs numba.

This is called for every linear layer of every decoded token: what sizes alone decide is worked out once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.runtime.scratch import SCRATCH, lines
from kernelgraft_core.runtime.threads import Launch, Phase

from .weight import PackedWeight

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # cpu_kernels.FLOAT, BFLOAT, HALF
LARGEST_BLOCK = 256  # values along K that share a scale
LEAST_ROWS = 4  # cpu_tile.QUAD


@dataclass(frozen=True)
class _Call:
    """What sizes alone decide: the launch, the last of the numbers it is told, and bytes of scratch."""

    launch: Launch
    sizes: tuple[int, ...]
    scratch: int


@functools.cache
def block_shape(group: int, k: int, lanes: int = 16) -> tuple[int, int] | None:
    """Vectors per block of activations, and blocks per vector; None where the kernel cannot run."""
    span = 4 * lanes
    if group % span == 0:
        return next(v for v in range(LARGEST_BLOCK // span, 0, -1) if group // span % v == 0), 1
    return (1, span // group) if group in (32, 64) and k % 64 == 0 else None


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``: contiguous ``(..., K)`` of a type in ``KINDS`` to ``(..., N)``; ``weight`` is arranged.

    There must be a token and LEAST_ROWS rows, and :func:`block_shape` must not be None.
    """
    n, groups = weight.scales.shape
    *lead, k = x.shape
    call = _call(x.numel() // k, n, k, groups, weight.bits, x.dtype)
    out = torch.empty((*lead, n), dtype=x.dtype)
    memory, address = SCRATCH.reserve(call.scratch)
    biased = (0, 0) if bias is None else (KINDS[bias.dtype], bias.data_ptr())
    call.launch(n, k, groups, *_addresses(weight), out.data_ptr(), *biased, x.data_ptr(), address, *call.sizes)
    del memory  # not before the launch is done
    return out


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """An arranged weight ``(N, K)`` in ``dtype``."""
    (n, groups), k = weight.scales.shape, weight.in_features
    launch, direct = _dequantize_launch(n, k // groups, weight.bits, dtype)
    out = torch.empty(n, k, dtype=dtype if direct else torch.float32)
    launch(n, k, groups, *_addresses(weight), out.data_ptr())
    return out.to(dtype)


def _addresses(weight: PackedWeight) -> tuple[int, int, int, int]:
    """Of ``qweight``, of ``qhigh`` where there is one, of scales and zeros."""
    first, *_, last, scales, zeros = (tensor.data_ptr() for tensor in (weight.qweight, *weight.tensors))
    return first, last, scales, zeros


@functools.lru_cache(maxsize=4096)
def _call(tokens: int, n: int, k: int, groups: int, bits: int, dtype: torch.dtype) -> _Call:
    from kernelgraft_core.runtime import cpu_vectors

    from . import cpu_kernels as kernels  # compiles, or loads what an earlier process compiled

    isa = cpu_vectors.instruction_set()
    shape = block_shape(k // groups, k, isa.lanes)
    if shape is None:
        isa = isa.narrow
        shape = block_shape(k // groups, k, isa.lanes)
        assert shape is not None  # other weights are dequantized
    vectors, parts = shape
    blocks = k * parts // (4 * isa.lanes * vectors)
    padded, steps, spread = -(-blocks // 16) * 16, -(-blocks // parts), 1 if parts == 1 else isa.lanes // 2
    x_scale = lines(2 * tokens * k)
    x_shift = x_scale + lines(4 * tokens * steps * spread)
    rest = x_shift + lines(4 * tokens * padded)
    uneven = 2 * rest
    launch = Launch(
        Phase(kernels.quantize_kernel().address, tokens, grain=4),
        Phase(kernels.rows_kernel(isa, bits, vectors, parts).address, -(-n // LEAST_ROWS), grain=8),
    )
    sizes = tokens, blocks, padded, steps, isa.lanes, spread, KINDS[dtype], x_scale, x_shift, rest, uneven
    return _Call(launch, sizes, uneven + tokens)


@functools.lru_cache(maxsize=4096)
def _dequantize_launch(n: int, group: int, bits: int, dtype: torch.dtype) -> tuple[Launch, bool]:
    """What writes a weight of ``n`` rows, and whether it writes ``dtype`` itself, or float32."""
    from kernelgraft_core.runtime import cpu_vectors

    from . import cpu_halves, cpu_kernels

    isa = cpu_vectors.instruction_set()
    if dtype in (torch.bfloat16, torch.float16) and cpu_halves.unsupported(isa, group) is None:
        lanes = isa.lanes if group % (4 * isa.lanes) == 0 else isa.narrow.lanes
        return Launch(Phase(cpu_halves.halves_kernel(bits, lanes, KINDS[dtype]).address, n, grain=16)), True
    return Launch(Phase(cpu_kernels.dequantize_kernel(bits).address, n, grain=16)), False
