"""The CPU backend of the packed linear layers: integer dot products on packed words, or dequantized blocks for a GEMM.

Which of the two runs depends on the number of tokens and on the processor: the integer kernel reads three or four bits
per weight and wins while memory or 16-bit integer arithmetic is the limit; a processor with bfloat16 matrix
instructions does large batches faster on dequantized blocks. ``kernelgraft tune`` measures where that turns.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase, parallel_for

from .weight import PackedWeight

_HAS_NUMBA = importlib.util.find_spec("numba") is not None
KEPT_SCRATCH = 1 << 20
_Arguments = ctypes.c_int64 * 25
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Scratch(threading.local):
    """Memory for quantized activations, one piece for each thread that calls."""

    def __init__(self) -> None:
        self.size, self.address, self.memory = 0, 0, torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        self.memory = torch.empty(size + 64, dtype=torch.uint8)
        self.address, self.size = -(-self.memory.data_ptr() // 64) * 64, size


_scratch = _Scratch()


@dataclass(frozen=True)
class Plan:
    run: Launch
    sizes: tuple[int, ...]
    scratch: int
    x_scale: int
    x_shift: int
    uneven: int
    rest: int


@functools.cache
def block_shape(lanes: int, group: int, k: int):
    """vectors per block, blocks per vector"""
    span = 4 * lanes
    if group % span == 0:
        return next(c for c in range(256 // span, 0, -1) if group // span % c == 0), 1
    if group in (32, 64) and span > group and k % 64 == 0:
        return 1, span // group
    return None


@functools.lru_cache(maxsize=4096)
def plan(tokens, n, k, groups, bits):
    from . import cpu_kernels as kernels
    from .cpu_vectors import instruction_set

    isa = instruction_set()
    shape = block_shape(isa.lanes, k // groups, k)
    if shape is None:
        isa = isa.narrow
        shape = block_shape(isa.lanes, k // groups, k)
    vectors, parts = shape
    lanes = isa.lanes
    blocks = k * parts // (4 * lanes * vectors)
    padded = -(-blocks // 16) * 16
    slots = -(-blocks // parts)
    spread = 1 if parts == 1 else lanes // 2

    def up(v):
        return -(-v // 64) * 64

    x_scale = up(2 * tokens * k)
    x_shift = x_scale + up(4 * tokens * slots * spread)
    rest = x_shift + up(4 * tokens * padded)
    uneven = 2 * rest
    launch = Launch(
        Phase(kernels.quantize_kernel().address, tokens, 4),
        Phase(kernels.rows_kernel(isa, bits, vectors, parts).address, -(-n // 4), 8),
    )
    return Plan(
        launch,
        (0, tokens, n, k, groups, blocks, padded, slots, lanes, spread),
        uneven + tokens,
        x_scale,
        x_shift,
        uneven,
        rest,
    )


def linear(x, qweight, qhigh, scales, zeros, bias, bits):
    n, k = qweight.shape[0], x.shape[-1]
    tokens = x.numel() // k
    p = plan(tokens, n, k, scales.shape[1], bits)
    if not x.is_contiguous():
        x = x.contiguous()
    dtype = x.dtype
    out = torch.empty((*x.shape[:-1], n), dtype=dtype)
    scratch = _scratch
    if scratch.size < p.scratch:
        scratch.reserve(p.scratch)
    at = scratch.address
    kind = _KINDS[dtype]
    args = _Arguments(
        *p.sizes,
        x.data_ptr(),
        kind,
        at,
        at + p.x_scale,
        at + p.x_shift,
        at + p.uneven,
        p.rest,
        qweight.data_ptr(),
        qhigh,
        scales.data_ptr(),
        zeros.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _KINDS[bias.dtype],
        out.data_ptr(),
        0,
    )
    p.run(args)
    return out
