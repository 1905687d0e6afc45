"""Products of bytes by oneDNN, as torch has it: for processors and installations without kernels of our own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.runtime.device import cpu_int8_is_exact

SHIFT = 128  # its fast products take unsigned activations: signed ones fall to a path thousands of times slower


@dataclass(frozen=True)
class Packed:
    """A weight in oneDNN's layout, whose tensor has no dispatch keys of an ordinary one: no module may hold it."""

    rows: int
    words: Tensor
    scale: Tensor


def unsupported() -> str | None:
    """Why it cannot be used here, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "torch has no oneDNN int8 products here"
    return None if cpu_int8_is_exact() else "oneDNN's int8 products saturate on this processor: it lacks VNNI"


def pack(int8: Tensor, scale: Tensor) -> Packed:
    """Of int8 ``(N, K)``, with the scale ``(N,)`` of each row."""
    words = torch.ops.onednn.qlinear_prepack(int8, None) if int8.numel() else int8.new_empty(0)
    return Packed(len(int8), words, scale)


def product(q: Tensor, x_scale: Tensor, weight: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(q @ W.T) * x_scale * scale + bias`` of int8 ``(M, K)``; nothing is empty."""
    unsigned = (q.to(torch.int16) + SHIFT).to(torch.uint8)
    n = weight.rows
    products: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, SHIFT, weight.words, torch.ones(n), torch.zeros(n, dtype=torch.int32), None, 1.0, 0,
        torch.float32, "none", [], "",
    )  # fmt: skip
    out = products.mul_(x_scale.reshape(-1, 1)).mul_(weight.scale.float())
    if bias is not None:
        out += bias.float()
    return out.to(dtype)
