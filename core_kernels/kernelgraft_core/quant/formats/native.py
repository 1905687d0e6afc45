"""Our own format, ``quant_method: "kernelgraft_awq"``: the tensors that the kernels read, as they read them.

Per linear layer ``qweight`` int32 ``(N, K / 8)`` with 4 bits, or ``qweight`` int32 ``(N, K / 16)`` and ``qhigh`` int32
``(N, K / 32)`` with 3, in the order of :mod:`kernelgraft_core.quant.int4` and :mod:`kernelgraft_core.quant.int3`;
``scales`` float16 ``(N, K / g)``; and, unless symmetric, ``zeros`` uint8 ``(N, K / g)``. N is any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.quant.w3a16.weight import W3A16Weight
from kernelgraft_core.quant.w4a16.weight import W4A16Weight
from kernelgraft_core.quant.weights import QuantizedWeight

from .layout import Layout, Part, StoredTensor

FORMAT_VERSION = 1
KINDS: dict[int, type[W4A16Weight] | type[W3A16Weight]] = {4: W4A16Weight, 3: W3A16Weight}


class Native(Layout):
    """kernelgraft's own format, 3 and 4 bits, symmetric or not."""

    label = "kernelgraft_awq"
    widths = (3, 4)
    may_be_symmetric = True

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[0], packed.shape[1] * KINDS[self.bits].planes["qweight"]

    def parts(self, n: int, k: int) -> dict[str, Part]:
        kind, groups = KINDS[self.bits], self.groups(k)
        if k % kind.unit() or (k // groups) % kind.unit():
            raise ValueError(
                f"K = {k} and groups of {k // groups}, but {self.bits} bits need multiples of {kind.unit()}"
            )
        parts = {name: Part((torch.int32,), (n, k // per_word)) for name, per_word in kind.planes.items()}
        parts["scales"] = Part((torch.float16,), (n, groups))
        if not self.symmetric:
            parts["zeros"] = Part((torch.uint8,), (n, groups))
        return parts

    def config(self, skipped: Sequence[str] | None) -> dict[str, Any]:
        return {
            "quant_method": "kernelgraft_awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "modules_to_not_convert": None if skipped is None else list(skipped),
            "format_version": FORMAT_VERSION,
        }

    def _read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scales = tensors["scales"]
        if self.symmetric:
            zeros = torch.full(scales.shape, self.zero, dtype=torch.uint8, device=scales.device)
        else:
            zeros = tensors["zeros"]
            if zeros.numel() and zeros.max() >= 1 << self.bits:
                raise ValueError(f"zeros go up to {int(zeros.max())}, expected 0..{(1 << self.bits) - 1}")
        kind = KINDS[self.bits]
        together = [*(tensors[name] for name in kind.planes), scales, zeros]
        return kind(*together).arranged()

    def _write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        *planes, scales, zeros = weight.tensors
        tensors = dict(zip(weight.planes, planes, strict=True)) | {"scales": scales}
        return tensors if self.symmetric else tensors | {"zeros": zeros}
