"""The W4A8 and W8A8 ops on a GPU: see :mod:`.triton_kernels`.

A weight is repacked at its first use and kept beside the packed one, in the same number of bytes, for as long as that
lives; warm a layer up before it is captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.runtime.device import arch_key
from kernelgraft_core.runtime.plans import PLANS
from kernelgraft_core.runtime.timing import measure_us

from . import reference
from .reference import Quantized
from .triton_kernels import (
    BYTES,
    EXACT_GROUPS,
    GROUPS,
    NIBBLES,
    product_kernel,
    quantize_kernel,
    sum_splits_kernel,
)
from .triton_tiles import COLUMNS, VERSION, Product, Tile, candidates, choose, parameters
from .weight import W4A8Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
QUANTIZE_BLOCK = 2048
SUM_BLOCK = 512


@dataclass(frozen=True)
class Prepared:
    """A weight as :func:`~.triton_kernels.product_kernel` takes it; absent tensors are stood in for by others."""

    form: int
    words: Tensor
    group: int
    group_stride: int
    group_scale: Tensor
    group_zero: Tensor


_prepared: Derived[Prepared] = Derived()


def prepare(weight: W4A8Weight) -> Prepared:
    """Repack a weight: words of 64 columns, and scales of groups innermost along N."""
    n, k = weight.out_features, weight.in_features
    q = weight.integers().view(n, k // COLUMNS, 2, COLUMNS // 2)
    words = (q[:, :, 0] | (q[:, :, 1] << 4)).contiguous().view(torch.int32).view(n, k // 8)
    if weight.group_scale is None or weight.group_zero is None:
        return Prepared(NIBBLES.value, words, k, 0, words, words)
    stride = -(-n // 4) * 4
    numbers = [
        torch.nn.functional.pad(t.T, (0, stride - n)).contiguous() for t in (weight.group_scale, weight.group_zero)
    ]
    form = GROUPS if weight.fits_bytes else EXACT_GROUPS
    return Prepared(form.value, words, weight.group_size, stride, *numbers)


def constants(tile: Tile, form: int, group: int, split: bool, bias: bool) -> dict[str, int | bool]:
    """The constant arguments of the kernel."""
    return {
        "FORM": form, "BM": tile.tokens, "BN": tile.rows, "BK": tile.columns, "GROUP": group,
        "GROUPS_HERE": max(1, tile.columns // group), "SPLIT": split, "HAS_BIAS": bias, "STAGES": tile.stages,
    }  # fmt: skip


def quantize_activation(x: Tensor) -> Quantized:
    return _quantize(x, x, x.shape[-1], 0.0, 0)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    return _quantize(x, weight.contiguous(), x.shape[-1], eps, 1)


def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    return _quantize(gate_up, gate_up, gate_up.shape[-1] // 2, 0.0, 2)


def w4a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    tensors = qweight, scale, group_scale, group_zero, zero
    prepared = _prepared.of(tensors, lambda: prepare(W4A8Weight(*tensors)))
    return product((q, x_scale, x_sums), prepared, scale, zero, bias, dtype)


def w4a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    quantized = quantize_activation(x)
    return w4a8_matmul(*quantized, qweight, scale, group_scale, group_zero, zero, bias, x.dtype)


def product(
    quantized: Quantized,
    weight: Prepared,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    splits: int | None = None,
) -> Tensor:
    """``(..., N)``, by a stored plan or a rule; measures while tuning. ``splits`` of K are chosen unless given."""
    q, x_scale, x_sums = (tensor.contiguous() for tensor in quantized)
    *lead, k = q.shape
    n, tokens = scale.shape[0], q.numel() // k if k else 0
    out = torch.empty((*lead, n), dtype=dtype, device=q.device)
    if not out.numel():
        return out
    op = "w8a8_linear" if weight.form == BYTES.value else "w4a8_linear"
    sizes = Product(op, tokens, n, k, weight.group, *_gpu(q.device))
    run = functools.partial(_launch, (q, x_scale, x_sums), weight, scale, zero, bias, out)
    if PLANS.should_tune(op, VERSION, sizes.arch_key, sizes.shape):
        runs = {name: (parameters(*found), functools.partial(run, *found)) for name, found in candidates(sizes).items()}
        measure = functools.partial(measure_us, device=q.device.type)
        PLANS.tune(op, VERSION, sizes.arch_key, sizes.shape, runs, measure)
    tile, chosen = choose(sizes)
    run(tile, chosen if splits is None else splits)
    return out


def _launch(
    quantized: Quantized,
    weight: Prepared,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
    splits: int,
) -> None:
    """Write the product to ``out``."""
    q, x_scale, x_sums = quantized
    k, n = q.shape[-1], scale.shape[0]
    tokens = q.numel() // k
    tiles = triton.cdiv(tokens, tile.tokens) * triton.cdiv(n, tile.rows)
    k_split = triton.cdiv(k // tile.columns, splits) * tile.columns
    splits = triton.cdiv(k, k_split)
    target = out if splits == 1 else torch.empty((splits, tokens, n), dtype=torch.int32, device=q.device)
    points, added = scale if zero is None else zero, scale if bias is None else bias.contiguous()
    with torch.cuda.device_of(q):
        product_kernel[tiles, splits](
            q, weight.words, weight.group_scale, weight.group_zero, scale, points, x_scale, x_sums, added, target,
            tokens, n, k, weight.group_stride, k_split,
            **constants(tile, weight.form, weight.group, splits > 1, bias is not None),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[triton.cdiv(n, SUM_BLOCK), tokens](
                target, scale, points, x_scale, x_sums, added, out, tokens, n,
                SPLITS=splits, BLOCK=SUM_BLOCK, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, num_warps=4,
            )  # fmt: skip


def _quantize(x: Tensor, weight: Tensor, k: int, eps: float, kind: int) -> Quantized:
    lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    if not rows.numel():
        return reference.quantize_activation(x[..., :k])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    q = torch.empty((*lead, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(lead, dtype=torch.float32, device=x.device)
    sums = torch.empty(lead, dtype=torch.int32, device=x.device)
    block = min(QUANTIZE_BLOCK, triton.next_power_of_2(k))
    with torch.cuda.device_of(x):
        quantize_kernel[len(rows),](
            rows, weight, q, scale, sums, k, rows.stride(0), eps, KIND=kind, BLOCK=block, num_warps=4
        )
    return q, scale, sums


@functools.cache
def _gpu(device: torch.device) -> tuple[int, str, int]:
    """The key of TILES, what plans are kept under, and the number of multiprocessors."""
    if device.type == "cpu":  # interpreted
        return 80, arch_key(device), 1
    properties = torch.cuda.get_device_properties(device)
    return 90 if properties.major == 9 else 80, arch_key(device), properties.multi_processor_count


def supports_quantize_activation(x: Tensor, *_: object) -> str | None:
    return unsupported(x.dtype, x.device)


supports_rms_norm_quantize = supports_silu_mul_quantize = supports_quantize_activation


def supports_w4a8_matmul(q: Tensor, x_scale: Tensor, x_sums: Tensor, *args: object) -> str | None:
    *weight, _, dtype = args
    return _unsupported_weight(weight) or unsupported(dtype, q.device)


def supports_w4a8_linear(x: Tensor, *args: object) -> str | None:
    return _unsupported_weight(args[:-1]) or unsupported(x.dtype, x.device)


def _unsupported_weight(weight: Sequence[object]) -> str | None:
    qweight, _, group_scale, *_ = weight
    assert isinstance(qweight, Tensor)
    if qweight.dim() != 2:
        return "the weight is arranged for a CPU"
    k = 2 * qweight.shape[1]
    if k == 0 or k % COLUMNS:
        return f"K = {k} is not a multiple of {COLUMNS}"
    if isinstance(group_scale, Tensor):
        group = k // group_scale.shape[1]
        if group != 32 and group % COLUMNS:
            return f"group size {group} is neither 32 nor a multiple of {COLUMNS}"
    return None


def unsupported(dtype: object, device: torch.device) -> str | None:
    """Why nothing here computes in a dtype on a device, or None."""
    if dtype not in FLOATS:
        return f"{dtype} is computed by the reference"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability is below 8.0"
    return None
