"""The W4A16 ops on a GPU: three ways to multiply, one for each range of tokens M.

``slice_k`` and ``gemm`` unpack weights on the way into the tensor cores (:mod:`.triton_kernels`); for very many tokens
``dequantize`` writes the weight out in 16 bits, block by block, and leaves the multiplication to cuBLAS.
:mod:`.triton_configs` chooses.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict

import torch
import triton
from torch import Tensor

from kernelgraft_core.runtime.device import arch_key
from kernelgraft_core.runtime.plans import PLANS
from kernelgraft_core.runtime.timing import measure_us

from .triton_configs import OP, VERSION, Config, architecture, candidates, choose_config, plan_shape
from .triton_kernels import dequantize_kernel, gemm_kernel, slice_k_kernel, sum_splits_kernel

# 1024 + q in float16 and 128 + q in bfloat16, for both halves of a word.
MAGIC = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
SCRATCH_BYTES = 64 << 20  # of 16-bit weight at a time
DEQUANTIZE_ROWS, DEQUANTIZE_COLUMNS = 16, 256
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    rows, k = qweight.shape[0], qweight.shape[1] * 8
    x2 = x.reshape(-1, k)
    if x2.shape[0] == 0 or rows == 0:
        return x.new_empty((*x.shape[:-1], rows))
    key = arch_key(x.device)
    shape = (x2.shape[0], rows, k, k // scales.shape[1])
    if PLANS.should_tune(OP, VERSION, key, plan_shape(x.dtype, *shape)):
        _tune(key, x2, qweight, scales, zeros, bias)
    config = choose_config(_architecture(x.device), key, x.dtype, *shape, _is_packed(scales, zeros))
    return run_w4a16_linear(config, x2, qweight, scales, zeros, bias).view(*x.shape[:-1], rows)


def _tune(key: str, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> None:
    rows, k = _shape(qweight)
    shape = (x.shape[0], rows, k, k // scales.shape[1])
    runs = {
        f"{c.kernel}-{c.block_m}x{c.block_n}x{c.block_k}-s{c.splits}-w{c.warps}": (
            asdict(c),
            functools.partial(run_w4a16_linear, c, x, qweight, scales, zeros, bias),
        )
        for c in candidates(_architecture(x.device), *shape, _is_packed(scales, zeros))
    }
    PLANS.tune(
        OP, VERSION, key, plan_shape(x.dtype, *shape), runs,
        functools.partial(measure_us, device=x.device.type),
    )  # fmt: skip


def run_w4a16_linear(
    config: Config, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    """:func:`w4a16_linear` of ``x`` ``(M, K)``, M and N not 0, in one given way; for tuning and tests."""
    x, qweight = x.contiguous(), qweight.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensors'
        if config.kernel == "dequantize":
            return _dequantized_linear(x, qweight, scales, zeros, bias)
        return _fused_linear(config, x, qweight, scales, zeros, bias)


def _fused_linear(
    config: Config, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    tokens, rows, k = x.shape[0], *_shape(qweight)
    out = x.new_empty((tokens, rows))
    fixed = constants(config, rows, k, scales.shape[1], _is_packed(scales, zeros)) | {"HAS_BIAS": bias is not None}
    launch = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers or None}
    row_words = k // 8 // fixed["ALIGN"]
    strides = (*scales.stride(), *zeros.stride())
    if config.kernel == "slice_k":
        slice_k_kernel[triton.cdiv(rows, config.block_n),](
            x, qweight, scales, zeros, x if bias is None else bias, out,
            tokens, rows, k, row_words, MAGIC[x.dtype], *strides,
            **fixed, **launch,
        )  # fmt: skip
        return out
    splits = config.splits
    target = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
    k_split = triton.cdiv(triton.cdiv(k, config.block_k), splits) * config.block_k
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(rows, config.block_n)
    gemm_kernel[tiles, splits](
        x, qweight, scales, zeros, x if bias is None else bias, target,
        tokens, rows, k, row_words, k_split, MAGIC[x.dtype], *strides,
        **fixed, **launch,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        sum_splits_kernel[triton.cdiv(out.numel(), block),](
            target, x if bias is None else bias, out, out.numel(), rows,
            SPLITS=splits, BLOCK=block, HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    return out


def _dequantized_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    rows, k = _shape(qweight)
    out = x.new_empty((x.shape[0], rows))
    step = _block(rows, k * x.element_size(), 128)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        weight = _dequantize(qweight[part], scales[part], zeros[part], x.dtype, 0, k)
        if bias is None:
            torch.mm(x, weight.T, out=out[:, part])
        else:
            torch.addmm(bias[part], x, weight.T, out=out[:, part])
    return out


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    rows, k = _shape(qweight)
    grad2 = grad.reshape(-1, rows)
    out = grad.new_empty((grad2.shape[0], k))
    qweight = qweight.contiguous()
    step = _block(k, rows * grad.element_size(), DEQUANTIZE_COLUMNS)  # whole tiles, whose groups are known
    with torch.cuda.device_of(grad):
        for begin in range(0, k if out.numel() else 0, step):
            end = min(begin + step, k)
            weight = _dequantize(qweight, scales, zeros, grad.dtype, begin, end)
            torch.mm(grad2, weight, out=out[:, begin:end])
    return out.view(*grad.shape[:-1], k)


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.cuda.device_of(qweight):
        return _dequantize(qweight.contiguous(), scales, zeros, dtype, 0, qweight.shape[1] * 8)


def _dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Columns ``begin`` to ``end``, a multiple of 8 each, of the weight: ``(N, end - begin)``."""
    rows, k = _shape(qweight)
    out = torch.empty((rows, end - begin), dtype=dtype, device=qweight.device)
    if out.numel() == 0:
        return out
    layout = _layout(k, scales.shape[1], DEQUANTIZE_COLUMNS)
    dequantize_kernel[triton.cdiv(rows, DEQUANTIZE_ROWS), triton.cdiv(end - begin, DEQUANTIZE_COLUMNS)](
        qweight, scales, zeros, out, rows, end - begin, begin, k, k // 8 // layout["ALIGN"],
        *scales.stride(), *zeros.stride(), BN=DEQUANTIZE_ROWS, BK=DEQUANTIZE_COLUMNS, **layout, num_warps=4,
    )  # fmt: skip
    return out


def _shape(qweight: Tensor) -> tuple[int, int]:
    return qweight.shape[0], qweight.shape[1] * 8


def _block(size: int, unit_bytes: int, multiple: int) -> int:
    """How many of ``size`` units to dequantize at once so that they fit the scratch space, in whole multiples."""
    return min(size, max(multiple, SCRATCH_BYTES // max(unit_bytes, 1) // multiple * multiple))


def constants(config: Config, rows: int, k: int, groups: int, packed: bool) -> dict[str, int | bool]:
    """The constant arguments, but HAS_BIAS, of the kernel that runs a ``slice_k`` or ``gemm`` configuration.

    Args:
        rows, k: shape of the weight.
        groups: scales of a row.
        packed: whether scales and zeros may be read several rows at once.
    """
    kind = {"SLICES": config.warps} if config.kernel == "slice_k" else {"SPLIT": config.splits > 1}
    return kind | _layout(k, groups, config.block_k) | {
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "STAGES": config.stages,
        "EVEN_K": k % config.step == 0, "PACKED": packed and rows % 4 == 0, "INTERPRETED": INTERPRETED,
    }  # fmt: skip


def _layout(k: int, groups: int, block_k: int) -> dict[str, int]:
    """What the kernels know of a weight when they are compiled; see :mod:`.triton_kernels`."""
    words, group = k // 8, k // groups
    if groups == 1 or group % block_k == 0:
        per_block = 1
    elif block_k % group == 0:
        per_block = block_k // group
    else:
        per_block = block_k // 8  # a group may begin at any word
    align = 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1
    return {"GROUP": 0 if groups == 1 else group, "GROUPS": per_block, "ALIGN": align}


def _is_packed(scales: Tensor, zeros: Tensor) -> bool:
    """Whether scales can be read two rows to a word and zeros four."""
    return (
        scales.shape[0] % 4 == 0
        and scales.stride(0) == zeros.stride(0) == 1
        and (scales.shape[1] == 1 or (scales.stride(1) % 2 == 0 and zeros.stride(1) % 4 == 0))
        and scales.data_ptr() % 4 == zeros.data_ptr() % 4 == 0
    )


@functools.cache
def _architecture(device: torch.device) -> int:
    """Key of the cost model's table, 0 for a GPU it does not hold."""
    if device.type == "cpu":  # the interpreter
        return 90
    return architecture(torch.cuda.get_device_capability(device)) or 0


def _unsupported(tensor: Tensor, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if dtype not in dtypes:
        return f"{dtype} is not one of {', '.join(map(str, dtypes))}"
    if not _architecture(tensor.device):
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def supports_w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> str | None:
    return _unsupported(x, x.dtype, (torch.float16, torch.bfloat16))


def supports_w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> str | None:
    return _unsupported(grad, grad.dtype, (torch.float16, torch.bfloat16))


def supports_dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> str | None:
    return _unsupported(qweight, dtype, (torch.float16, torch.bfloat16, torch.float32))
