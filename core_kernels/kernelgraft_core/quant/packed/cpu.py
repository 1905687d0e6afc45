"""The CPU backend of the packed linear layers: integer dot products on packed words, or dequantized blocks for a GEMM.

Which of the two runs depends on the number of tokens and on the processor: the integer kernel reads three or four bits
per weight and wins while memory or 16-bit integer arithmetic is the limit; a processor with bfloat16 matrix
instructions does large batches faster on dequantized blocks. ``kernelgraft tune`` measures where that turns. Without
numba, PyTorch's own int4 kernel takes the place of ours.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TypeVar

import torch
from torch import Tensor

from kernelgraft_core.runtime.device import arch_key
from kernelgraft_core.runtime.notices import warn_once
from kernelgraft_core.runtime.plans import PLANS
from kernelgraft_core.runtime.timing import measure_us

from . import cpu_aten, cpu_integer, reference
from .weight import PackedWeight

VERSION = 3  # of the paths; a new version makes stored plans void
LARGEST_BUCKET = 512  # tokens; beyond, the choice stays what it is there
SCRATCH_BYTES = 8 << 20  # of one dequantized block
# From how many tokens on a processor that multiplies the activations' type fast does so on dequantized blocks: where
# they are dequantized by table (:mod:`.cpu_halves`), and elsewhere. Measured on an AMD EPYC with AVX512-BF16; with AMX
# not measured, and sooner because its products are.
GEMM_TOKENS = {"avx512": (32, 128), "amx": (16, 48)}
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
Weight = TypeVar("Weight", bound=PackedWeight)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``: ``(..., K)`` to ``(..., N)`` by a stored plan or a rule; measures while tuning.

    Raises:
        ValueError: the last axis of ``x`` is not K.
    """
    k = weight.in_features
    if x.shape[-1] != k:
        raise ValueError(f"x is {tuple(x.shape)}, expected (..., {k})")
    weight, tokens = _arranged(weight), x.numel() // k
    x = x if x.is_contiguous() else x.contiguous()
    if PLANS.is_tuning:
        _tune(tokens, x, weight, bias)
    return _run(choose_path(tokens, weight, x.dtype), x, weight, bias)


def dgrad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """``grad @ W``: ``(..., N)`` to ``(..., K)``."""
    weight = _arranged(weight)
    rows = grad.unsqueeze(0).flatten(0, -2)  # not reshape(-1, N): N may be 0
    dtype = _block_dtype(len(rows), weight.group_size, grad.dtype)
    rows = rows.to(dtype)
    out = torch.zeros(len(rows), weight.in_features)
    for first, last in _blocks(weight):
        out += rows[:, first:last] @ _dequantize_block(weight, first, last, dtype)
    return out.to(grad.dtype).view(*grad.shape[:-1], weight.in_features)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``W`` ``(N, K)``."""
    weight = _arranged(weight)
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
    for first, last in _blocks(weight):
        out[first:last] = _dequantize_block(weight, first, last, dtype)
    return out


def unsupported(dtype: torch.dtype) -> str | None:
    """Why this backend does not compute in a type, or None."""
    return None if dtype in cpu_integer.KINDS else f"{str(dtype).removeprefix('torch.')} is computed by the reference"


def choose_path(tokens: int, weight: PackedWeight, dtype: torch.dtype) -> str:
    """``"integer"``, ``"int4pack"`` or ``"dequantize"``: what a stored plan says, else by shape and processor alone."""
    sizes = _sizes(weight)
    paths = _possible_paths(tokens, *sizes, weight.bits, dtype, _gemm_dtype(dtype), _HAS_NUMBA)
    if len(paths) > 1:
        plan = PLANS.lookup(*plan_op(weight.bits), _arch(), plan_shape(tokens, *sizes, dtype))
        if plan is not None and plan.get("path") in paths:
            return str(plan["path"])
    return paths[0]


@functools.cache
def plan_op(bits: int) -> tuple[str, int]:
    """The op and version that plans are kept under."""
    return f"w{bits}a16_linear", VERSION


@functools.lru_cache(maxsize=4096)
def plan_shape(tokens: int, n: int, k: int, group: int, dtype: torch.dtype) -> dict[str, str | int]:
    """What a plan is kept under: tokens rounded up to a power of two, at most :data:`LARGEST_BUCKET`."""
    bucket = min(1 << max(0, tokens - 1).bit_length(), LARGEST_BUCKET)
    return {"m": bucket, "n": n, "k": k, "group": group, "dtype": str(dtype).removeprefix("torch.")}


@functools.lru_cache(maxsize=4096)
def _possible_paths(
    tokens: int, n: int, k: int, group: int, bits: int, dtype: torch.dtype, gemm_dtype: torch.dtype, has_numba: bool
) -> tuple[str, ...]:
    """All ways to compute this here, the one to take without a plan first."""
    if tokens == 0 or n == 0:
        return ("dequantize",)
    if not has_numba:
        by_aten = cpu_aten.unsupported(bits, n, group, dtype) is None
        instead = "runs on PyTorch's int4 kernel and keeps a second copy of the weight"
        warn_once(f"numba is not installed: W{bits}A16 {instead if bits == 4 else 'is dequantized block by block'}")
        if not by_aten:
            return ("dequantize",)
        return ("int4pack", "dequantize") if tokens <= 16 else ("dequantize", "int4pack")
    if n < cpu_integer.LEAST_ROWS or cpu_integer.block_shape(group, k) is None:
        warn_once(
            f"W{bits}A16 with N = {n}, K = {k} and group size {group} is dequantized block by block: "
            f"the integer kernel takes N >= {cpu_integer.LEAST_ROWS} and groups of 32 or multiples of 64"
        )
        return ("dequantize",)
    if tokens >= _gemm_tokens(group) and gemm_dtype != torch.float32:
        return ("dequantize", "integer")
    return ("integer", "dequantize")


def _run(path: str, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    if path == "integer":
        return cpu_integer.product(x, weight, bias if bias is None else bias.contiguous())
    rows = x.view(-1, x.shape[-1])
    out = cpu_aten.product(rows, weight) if path == "int4pack" else _dequantized_linear(rows, weight)
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _tune(tokens: int, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    sizes = _sizes(weight)
    shape = plan_shape(tokens, *sizes, x.dtype)
    paths = _possible_paths(tokens, *sizes, weight.bits, x.dtype, _gemm_dtype(x.dtype), _HAS_NUMBA)
    if len(paths) > 1 and PLANS.should_tune(*plan_op(weight.bits), _arch(), shape):
        runs = {path: ({"path": path}, functools.partial(_run, path, x, weight, bias)) for path in paths}
        PLANS.tune(*plan_op(weight.bits), _arch(), shape, runs, measure_us)


def _sizes(weight: PackedWeight) -> tuple[int, int, int]:
    """N, K and the group size."""
    n, groups = weight.scales.shape
    k = weight.in_features
    return n, k, k // groups


def _arranged(weight: Weight) -> Weight:
    return weight if all(tensor.is_contiguous() for tensor in weight.tensors) else weight.arranged()


@functools.cache
def _arch() -> str:
    return arch_key("cpu")


@functools.cache
def _gemm_tokens(group: int) -> int:
    return GEMM_TOKENS["amx" if _arch() == "cpu-amx" else "avx512"][0 if _by_table(group) else 1]


@functools.cache
def _by_table(group: int) -> bool:
    """Whether weights are dequantized to 16 bits directly, which takes an eighth of the time."""
    if not _HAS_NUMBA:
        return False
    from kernelgraft_core.runtime import cpu_vectors

    from . import cpu_halves

    return cpu_halves.unsupported(cpu_vectors.instruction_set(), group) is None


def _blocks(weight: PackedWeight) -> list[tuple[int, int]]:
    rows = max(1, SCRATCH_BYTES // (4 * max(1, weight.in_features)))
    return [(first, min(first + rows, weight.out_features)) for first in range(0, weight.out_features, rows)]


def _dequantize_block(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    block = type(weight)(*(tensor[first:last] for tensor in weight.tensors))
    if _HAS_NUMBA:
        return cpu_integer.dequantize(block, dtype)
    return reference.dequantize(block.integers(), block.scales, block.zeros, dtype)


def _dequantized_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    dtype = _block_dtype(len(x), weight.group_size, x.dtype)
    x = x.to(dtype)
    out = torch.empty(len(x), weight.out_features, dtype=dtype)
    for first, last in _blocks(weight):
        out[:, first:last] = x @ _dequantize_block(weight, first, last, dtype).T
    return out


def _block_dtype(tokens: int, group: int, dtype: torch.dtype) -> torch.dtype:
    """What to dequantize to: for few tokens that is what takes the time, and float32 spares rounding the weight."""
    return _gemm_dtype(dtype) if tokens >= _gemm_tokens(group) else torch.float32


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
