"""The ops of a packed weight on a GPU: three ways to multiply, one for each range of tokens M.

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

from .triton_configs import Config, architecture, candidates, choose_config, plan_op, plan_shape
from .triton_kernels import dequantize_kernel, gemm_kernel, slice_k_kernel, sum_splits_kernel
from .weight import PackedWeight

# 1024 + q in float16 and 128 + q in bfloat16, for both halves of a word.
MAGIC = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
SCRATCH_BYTES = 64 << 20  # of 16-bit weight at a time
DEQUANTIZE_ROWS, DEQUANTIZE_COLUMNS = 16, 256
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``: ``(..., K)`` to ``(..., N)``, by a stored plan or the cost model; measures while tuning."""
    rows, k = weight.out_features, weight.in_features
    x2 = x.reshape(-1, k)
    if x2.shape[0] == 0 or rows == 0:
        return x.new_empty((*x.shape[:-1], rows))
    key = arch_key(x.device)
    shape = (x2.shape[0], rows, k, weight.group_size)
    if PLANS.should_tune(*plan_op(weight.bits), key, plan_shape(x.dtype, *shape)):
        _tune(key, x2, weight, bias)
    config = choose_config(_architecture(x.device), key, weight.bits, x.dtype, *shape, _is_packed(weight))
    return run_linear(config, x2, weight, bias).view(*x.shape[:-1], rows)


def _tune(key: str, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    shape = (x.shape[0], weight.out_features, weight.in_features, weight.group_size)
    runs = {
        f"{c.kernel}-{c.block_m}x{c.block_n}x{c.block_k}-s{c.splits}-w{c.warps}": (
            asdict(c),
            functools.partial(run_linear, c, x, weight, bias),
        )
        for c in candidates(_architecture(x.device), weight.bits, *shape, _is_packed(weight))
    }
    PLANS.tune(
        *plan_op(weight.bits), key, plan_shape(x.dtype, *shape), runs,
        functools.partial(measure_us, device=x.device.type),
    )  # fmt: skip


def run_linear(config: Config, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """:func:`linear` of ``x`` ``(M, K)``, M and N not 0, in one given way; for tuning and tests."""
    x = x.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensors'
        run = _dequantized_linear if config.kernel == "dequantize" else functools.partial(_fused_linear, config)
        return run(x, weight, bias)


def _fused_linear(config: Config, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    tokens, rows, k = x.shape[0], weight.out_features, weight.in_features
    qweight, qhigh, scales, zeros = _pointers(weight)
    out = x.new_empty((tokens, rows))
    fixed = constants(config, type(weight), rows, k, scales.shape[1], _is_packed(weight))
    fixed["HAS_BIAS"] = bias is not None
    launch = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers or None}
    row_words = k // weight.unit() // fixed["ALIGN"]
    strides = (*scales.stride(), *zeros.stride())
    if config.kernel == "slice_k":
        slice_k_kernel[triton.cdiv(rows, config.block_n),](
            x, qweight, qhigh, scales, zeros, x if bias is None else bias, out,
            tokens, rows, k, row_words, MAGIC[x.dtype], *strides,
            **fixed, **launch,
        )  # fmt: skip
        return out
    splits = config.splits
    target = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
    k_split = triton.cdiv(triton.cdiv(k, config.block_k), splits) * config.block_k
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(rows, config.block_n)
    gemm_kernel[tiles, splits](
        x, qweight, qhigh, scales, zeros, x if bias is None else bias, target,
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


def _dequantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    rows, k = weight.out_features, weight.in_features
    out = x.new_empty((x.shape[0], rows))
    step = _block(rows, k * x.element_size(), 128)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        dense = _dequantize(type(weight)(*(tensor[part] for tensor in weight.tensors)), x.dtype, 0, k)
        if bias is None:
            torch.mm(x, dense.T, out=out[:, part])
        else:
            torch.addmm(bias[part], x, dense.T, out=out[:, part])
    return out


def dgrad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """``grad @ W``: ``(..., N)`` to ``(..., K)``."""
    rows, k = weight.out_features, weight.in_features
    grad2 = grad.reshape(-1, rows)
    out = grad.new_empty((grad2.shape[0], k))
    step = _block(k, rows * grad.element_size(), DEQUANTIZE_COLUMNS)  # whole tiles, whose groups are known
    with torch.cuda.device_of(grad):
        for begin in range(0, k if out.numel() else 0, step):
            end = min(begin + step, k)
            torch.mm(grad2, _dequantize(weight, grad.dtype, begin, end), out=out[:, begin:end])
    return out.view(*grad.shape[:-1], k)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``W`` ``(N, K)``."""
    with torch.cuda.device_of(weight.qweight):
        return _dequantize(weight, dtype, 0, weight.in_features)


def _dequantize(weight: PackedWeight, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Columns ``begin`` to ``end``, whole words of each plane, of the weight: ``(N, end - begin)``."""
    rows, k = weight.out_features, weight.in_features
    qweight, qhigh, scales, zeros = _pointers(weight)
    out = torch.empty((rows, end - begin), dtype=dtype, device=qweight.device)
    if out.numel() == 0:
        return out
    layout = _layout(weight.unit(), k, scales.shape[1], DEQUANTIZE_COLUMNS)
    dequantize_kernel[triton.cdiv(rows, DEQUANTIZE_ROWS), triton.cdiv(end - begin, DEQUANTIZE_COLUMNS)](
        qweight, qhigh, scales, zeros, out,
        rows, end - begin, begin, k, k // weight.unit() // layout["ALIGN"], *scales.stride(), *zeros.stride(),
        BITS=weight.bits, BN=DEQUANTIZE_ROWS, BK=DEQUANTIZE_COLUMNS, **layout, num_warps=4,
    )  # fmt: skip
    return out


def _pointers(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qweight, qhigh, scales and zeros as the kernels take them; a weight of one plane has it in qhigh's place too."""
    *planes, scales, zeros = weight.tensors
    return planes[0].contiguous(), planes[-1].contiguous(), scales, zeros


def _block(size: int, unit_bytes: int, multiple: int) -> int:
    """How many of ``size`` units to dequantize at once so that they fit the scratch space, in whole multiples."""
    return min(size, max(multiple, SCRATCH_BYTES // max(unit_bytes, 1) // multiple * multiple))


def constants(
    config: Config, kind: type[PackedWeight], rows: int, k: int, groups: int, packed: bool
) -> dict[str, int | bool]:
    """The constant arguments, but HAS_BIAS, of the kernel that runs a ``slice_k`` or ``gemm`` configuration.

    Args:
        kind: of the weight.
        rows, k: shape of the weight.
        groups: scales of a row.
        packed: whether scales and zeros may be read several rows at once.
    """
    own = {"SLICES": config.warps} if config.kernel == "slice_k" else {"SPLIT": config.splits > 1}
    return own | _layout(kind.unit(), k, groups, config.block_k) | {
        "BITS": kind.bits, "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "STAGES": config.stages,
        "EVEN_K": k % config.step == 0, "PACKED": packed and rows % 4 == 0, "INTERPRETED": INTERPRETED,
    }  # fmt: skip


def _layout(unit: int, k: int, groups: int, block_k: int) -> dict[str, int]:
    """What the kernels know of a weight when they are compiled; see :mod:`.triton_kernels`."""
    words, group = k // unit, k // groups
    if groups == 1 or group % block_k == 0:
        per_block = 1
    elif block_k % group == 0:
        per_block = block_k // group
    else:
        per_block = block_k // unit  # a group may begin at any word
    align = 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1
    return {"GROUP": 0 if groups == 1 else group, "GROUPS": per_block, "ALIGN": align}


def _is_packed(weight: PackedWeight) -> bool:
    """Whether scales can be read two rows to a word and zeros four."""
    scales, zeros = weight.scales, weight.zeros
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


def unsupported_product(x: Tensor) -> str | None:
    """Why :func:`linear` and :func:`dgrad` cannot take these activations or gradients, or None."""
    return _unsupported(x, x.dtype, (torch.float16, torch.bfloat16))


def unsupported_dequantize(qweight: Tensor, dtype: torch.dtype) -> str | None:
    """Why :func:`dequantize` cannot give this dtype, or None."""
    return _unsupported(qweight, dtype, (torch.float16, torch.bfloat16, torch.float32))


def _unsupported(tensor: Tensor, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if dtype not in dtypes:
        return f"{dtype} is not one of {', '.join(map(str, dtypes))}"
    if not _architecture(tensor.device):
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return f"compute capability {major}.{minor} is below 8.0"
    return None
