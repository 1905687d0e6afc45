"""Products of bytes by oneDNN, as torch has it: for processors and installations without kernels of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.runtime.device import cpu_int8_is_exact

SHIFT = 128  # its fast products take unsigned activations: signed ones fall to a path thousands of times slower

_packed: Derived[Tensor] = Derived()


def unsupported() -> str | None:
    """Why it cannot be used here, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "torch has no oneDNN int8 products here"
    return None if cpu_int8_is_exact() else "oneDNN's int8 products saturate on this processor: it lacks VNNI"


def product(q: Tensor, x_scale: Tensor, int8: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(q @ int8.T) * x_scale * scale + bias`` for int8 ``(M, K)`` and ``(N, K)``; neither M nor N is 0."""
    n = len(int8)
    # In oneDNN's layout. It has no dispatch keys of an ordinary tensor, so no module may hold it.
    packed = _packed.of((int8,), lambda: torch.ops.onednn.qlinear_prepack(int8, None))
    unsigned = (q.to(torch.int16) + SHIFT).to(torch.uint8)
    products: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, SHIFT, packed, torch.ones(n), torch.zeros(n, dtype=torch.int32), None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    out = products.mul_(x_scale.reshape(-1, 1)).mul_(scale.float())
    if bias is not None:
        out += bias.float()
    return out.to(dtype)
