"""The CPU backend of W4A16: integer dot products on the packed weight, or blocks of it dequantized for a GEMM.

Which of the two runs depends on the number of tokens and on the processor: the integer kernel reads four bits per
weight and wins while memory or 16-bit integer arithmetic is the limit; a processor with bfloat16 matrix instructions
does large batches faster on dequantized blocks. ``kernelgraft tune`` measures where that turns. Without numba,
PyTorch's own int4 kernel takes the place of ours.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.device import arch_key
from kernelgraft_core.runtime.plans import PLANS
from kernelgraft_core.runtime.threads import parallel_for
from kernelgraft_core.runtime.timing import measure_us

from . import reference
from .weight import W4A16Weight

log = logging.getLogger("kernelgraft")

OP, VERSION = "w4a16_linear", 1  # a new version makes stored plans void
LARGEST_BUCKET = 512  # tokens; beyond, the choice stays what it is there
SCRATCH_BYTES = 8 << 20  # of one dequantized block
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    weight = W4A16Weight(qweight, scales, zeros).arranged()
    if PLANS.is_tuning:
        _tune(rows, weight)
    out = _run(choose_path(len(rows), weight, x.dtype), rows, weight)
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    weight = W4A16Weight(qweight, scales, zeros).arranged()
    rows = grad.unsqueeze(0).flatten(0, -2)  # not reshape(-1, N): N may be 0
    dtype = _gemm_dtype(grad.dtype)
    rows = rows.to(dtype)
    out = torch.zeros(len(rows), weight.in_features)
    for first, last in _blocks(weight):
        out += rows[:, first:last] @ _dequantize_block(weight, first, last, dtype)
    return out.to(grad.dtype).view(*grad.shape[:-1], weight.in_features)


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    weight = W4A16Weight(qweight, scales, zeros).arranged()
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
    for first, last in _blocks(weight):
        out[first:last] = _dequantize_block(weight, first, last, dtype)
    return out


def supports_w4a16_linear(x: Tensor, *_: Any) -> str | None:
    return "float64 is computed by the reference" if x.dtype == torch.float64 else None


supports_w4a16_linear_dgrad = supports_w4a16_linear


def supports_dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> str | None:
    return "float64 is computed by the reference" if dtype == torch.float64 else None


def choose_path(tokens: int, weight: W4A16Weight, dtype: torch.dtype) -> str:
    """``"integer"``, ``"int4pack"`` or ``"dequantize"``: what a stored plan says, else by shape and processor alone."""
    paths = _possible_paths(tokens, weight, dtype)
    if len(paths) > 1:
        plan = PLANS.lookup(OP, VERSION, _arch(), plan_shape(tokens, *_sizes(weight), dtype))
        if plan is not None and plan.get("path") in paths:
            return str(plan["path"])
    return paths[0]


@functools.lru_cache(maxsize=4096)
def plan_shape(tokens: int, n: int, k: int, group: int, dtype: torch.dtype) -> dict[str, str | int]:
    """What a plan is kept under: tokens rounded up to a power of two, at most :data:`LARGEST_BUCKET`."""
    bucket = min(1 << max(0, tokens - 1).bit_length(), LARGEST_BUCKET)
    return {"m": bucket, "n": n, "k": k, "group": group, "dtype": str(dtype).removeprefix("torch.")}


def _possible_paths(tokens: int, weight: W4A16Weight, dtype: torch.dtype) -> tuple[str, ...]:
    """All ways to compute this here, the one to take without a plan first."""
    if tokens == 0 or weight.out_features == 0:
        return ("dequantize",)
    if not _HAS_NUMBA:
        _say_once("numba is not installed: W4A16 runs on PyTorch's int4 kernel and keeps a second copy of the weight")
        if dtype == torch.float32 or _int4pack_reason(weight) is not None:
            return ("dequantize",)
        return ("int4pack", "dequantize") if tokens <= 16 else ("dequantize", "int4pack")
    if weight.out_features < 4 or _block_shape(weight) is None:
        _say_once(
            f"W4A16 with N = {weight.out_features}, K = {weight.in_features} and group size {weight.group_size} "
            "is dequantized block by block: the integer kernel takes N >= 4 and groups of 32 or multiples of 64"
        )
        return ("dequantize",)
    if tokens >= 48 and _gemm_dtype(dtype) != torch.float32:
        return ("dequantize", "integer")
    return ("integer", "dequantize")


def _run(path: str, rows: Tensor, weight: W4A16Weight) -> Tensor:
    if path == "integer":
        return _integer_linear(rows, weight)
    return _int4pack_linear(rows, weight) if path == "int4pack" else _dequantized_linear(rows, weight)


def _tune(rows: Tensor, weight: W4A16Weight) -> None:
    shape = plan_shape(len(rows), *_sizes(weight), rows.dtype)
    paths = _possible_paths(len(rows), weight, rows.dtype)
    if len(paths) > 1 and PLANS.should_tune(OP, VERSION, _arch(), shape):
        runs = {path: ({"path": path}, functools.partial(_run, path, rows, weight)) for path in paths}
        PLANS.tune(OP, VERSION, _arch(), shape, runs, measure_us)


def _sizes(weight: W4A16Weight) -> tuple[int, int, int]:
    """N, K and the group size."""
    n, words = weight.qweight.shape
    return n, words * 8, words * 8 // weight.scales.shape[1]


@functools.cache
def _arch() -> str:
    return arch_key("cpu")


@functools.cache
def _say_once(message: str) -> None:
    log.warning("%s", message)


def _block_shape(weight: W4A16Weight) -> tuple[int, int] | None:
    """Chunks of 64 per activation block and blocks per chunk; None where the integer kernel cannot run."""
    _, k, group = _sizes(weight)
    return _chunks_and_halves(group, k)


@functools.cache
def _chunks_and_halves(group_size: int, k: int) -> tuple[int, int] | None:
    if group_size == 32 and k % 64 == 0:
        return 1, 2
    if group_size % 64:
        return None
    return next(c for c in (4, 3, 2, 1) if group_size // 64 % c == 0), 1


@functools.cache
def _rows_kernel(chunks: int, halves: int) -> Any:
    from .cpu_kernel import rows_kernel  # compiles, or loads what an earlier process compiled

    return rows_kernel(chunks, halves)


@dataclass(frozen=True)
class _Launch:
    """What a call of the integer kernel needs beside its pointers; worked out once per shape."""

    kernel: int
    quantize: int
    sizes: tuple[int, ...]
    scales_at: int
    scratch: int

    @property
    def blocks(self) -> int:
        return self.sizes[4]


@functools.lru_cache(maxsize=4096)
def _launch(tokens: int, n: int, k: int, groups: int) -> _Launch:
    from . import cpu_kernel

    shape = _chunks_and_halves(k // groups, k)
    assert shape is not None  # choose_path sends such weights elsewhere
    chunks, halves = shape
    blocks = k * halves // (64 * chunks)
    integers, scales = 2 * tokens * k, 32 * ((tokens + 3) // 4) * blocks
    return _Launch(
        _rows_kernel(chunks, halves).address,
        cpu_kernel.quantize_tokens.address,
        (tokens, n, k, groups, blocks),
        integers,
        integers + scales,
    )


_Arguments = ctypes.c_int64 * 13


def _integer_linear(x: Tensor, weight: W4A16Weight) -> Tensor:
    x = x.to(torch.float32).contiguous()
    out, uneven = _integer_product(x, weight)
    if uneven:
        # In some block one value leaves the others too few of the 16 bits: add the product of what rounding left over.
        tokens, rest = _left_over(x, x.shape[1] // _launch_for(x, weight).blocks)
        out[tokens] += _integer_product(rest, weight)[0]
    return out


def _left_over(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Indices of tokens with an uneven block, and what the kernel's rounding dropped of them; its own arithmetic."""
    from .cpu_kernel import EVEN, LARGEST

    blocks = x.view(len(x), -1, block)
    size = blocks.abs()
    largest = size.amax(-1)
    others = (size.sum(-1) - largest) / (block - 1)
    tokens = ((others * EVEN < largest) & largest.isfinite()).any(-1).nonzero().flatten()
    blocks, largest = blocks[tokens], largest[tokens].unsqueeze(-1)
    kept = (blocks * (LARGEST / largest)).round() * (largest / LARGEST)
    rest = torch.where(largest > 1e-30, blocks - kept, 0.0)  # a block of zeros, or one that is not finite, adds nothing
    return tokens, rest.nan_to_num(0.0, 0.0, 0.0).reshape(len(tokens), -1)


def _launch_for(x: Tensor, weight: W4A16Weight) -> _Launch:
    return _launch(len(x), weight.qweight.shape[0], x.shape[1], weight.scales.shape[1])


def _integer_product(x: Tensor, weight: W4A16Weight) -> tuple[Tensor, bool]:
    """The product of float32 ``x``, and whether some block of it was uneven."""
    launch = _launch_for(x, weight)
    tokens, n = launch.sizes[:2]
    scratch = torch.empty(launch.scratch, dtype=torch.uint8)
    out = torch.empty(tokens, n)
    integers = scratch.data_ptr()
    args = _Arguments(
        *launch.sizes, x.data_ptr(), integers, integers + launch.scales_at, weight.qweight.data_ptr(),
        weight.scales.data_ptr(), weight.zeros.data_ptr(), out.data_ptr(), 0,
    )  # fmt: skip
    parallel_for(launch.quantize, args, tokens, grain=4)
    parallel_for(launch.kernel, args, (n + 3) // 4, grain=8)
    return out, bool(args[-1])


def _blocks(weight: W4A16Weight) -> list[tuple[int, int]]:
    rows = max(1, SCRATCH_BYTES // (4 * max(1, weight.in_features)))
    return [(first, min(first + rows, weight.out_features)) for first in range(0, weight.out_features, rows)]


def _dequantize_block(weight: W4A16Weight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if not _HAS_NUMBA:
        return reference.dequantize_w4a16(
            weight.qweight[first:last], weight.scales[first:last], weight.zeros[first:last], dtype
        )
    from . import cpu_kernel as kernel

    out = torch.empty(last - first, weight.in_features)
    args = _Arguments(
        0, last - first, weight.in_features, weight.scales.shape[1], 0, 0, 0, 0, weight.qweight[first:].data_ptr(),
        weight.scales[first:].data_ptr(), weight.zeros[first:].data_ptr(), out.data_ptr(), 0,
    )  # fmt: skip
    parallel_for(kernel.dequantize_rows.address, args, last - first, grain=16)
    return out.to(dtype)


def _dequantized_linear(x: Tensor, weight: W4A16Weight) -> Tensor:
    dtype = _gemm_dtype(x.dtype)
    x = x.to(dtype)
    out = torch.empty(len(x), weight.out_features, dtype=dtype)
    for first, last in _blocks(weight):
        out[:, first:last] = x @ _dequantize_block(weight, first, last, dtype).T
    return out


@functools.cache
def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to multiply dequantized blocks in: the activations' own type only where the processor multiplies it fast."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    # oneDNN counts an emulation on AVX2 as support; only AVX-512 and AMX have bfloat16 products.
    fast = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    return dtype if dtype in native and fast and native[dtype]() else torch.float32


# PyTorch's packed copy of a weight, for as long as the weight lives. Keyed by identity: tensors compare elementwise.
_int4packs: dict[int, tuple[int, Tensor]] = {}


def _int4pack_reason(weight: W4A16Weight) -> str | None:
    if weight.group_size not in (32, 64, 128, 256):
        return f"group size {weight.group_size}"
    return f"N = {weight.out_features}" if weight.out_features % 32 else None


def _int4pack_linear(x: Tensor, weight: W4A16Weight) -> Tensor:
    key, version = id(weight.qweight), 0 if weight.qweight.is_inference() else weight.qweight._version
    if _int4packs.get(key, (-1, None))[0] != version:
        if key not in _int4packs:
            weakref.finalize(weight.qweight, _int4packs.pop, key, None)
        _int4packs[key] = version, torch._convert_weight_to_int4pack_for_cpu(weight.integers().to(torch.int32), 1)
    # Scales are put together anew each time: they may be other ones, and there are few. PyTorch's kernel computes
    # (q - 8) * scale + zero.
    scales = weight.scales.float()
    shifts = (8 - weight.zeros.float()) * scales
    both = torch.stack((scales.T, shifts.T), -1).to(x.dtype).contiguous()
    return torch._weight_int4pack_mm_for_cpu(x.contiguous(), _int4packs[key][1], weight.group_size, both)
