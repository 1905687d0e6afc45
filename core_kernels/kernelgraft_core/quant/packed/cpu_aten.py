"""The 4-bit linear layer by PyTorch's own CPU kernel: what is left where numba is not installed.

It needs a packed copy of the weight, which is made at the first call and lives as long as the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived

from .weight import PackedWeight

_copies: Derived[Tensor] = Derived()


def unsupported(bits: int, n: int, group: int, dtype: torch.dtype) -> str | None:
    """Why PyTorch's kernel cannot run this, or None."""
    if bits != 4:
        return f"{bits} bits"
    if dtype == torch.float32:
        return "float32 would round scales and zero points no better, and is slower"
    if group not in (32, 64, 128, 256):
        return f"group size {group}"
    return f"N = {n}" if n % 32 else None


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ W.T`` of ``(M, K)``, with scales and zero points rounded to the type of ``x``."""
    packed = _copies.of(
        (weight.qweight,), lambda: torch._convert_weight_to_int4pack_for_cpu(weight.integers().to(torch.int32), 1)
    )
    # Scales are put together anew each time: they may be other ones, and there are few. PyTorch's kernel computes
    # (q - 8) * scale + zero.
    scales = weight.scales.float()
    shifts = (8 - weight.zeros.float()) * scales
    both = torch.stack((scales.T, shifts.T), -1).to(x.dtype).contiguous()
    return torch._weight_int4pack_mm_for_cpu(x.contiguous(), packed, weight.group_size, both)
