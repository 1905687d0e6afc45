"""Arguments for the three ops of a packed weight, and what people run instead; a family's ``examples`` binds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import dequantize
from .weight import PackedWeight


class LinearExamples:
    """The examples of the family ``name``, e.g. ``"w4a16"``, whose weight is a ``kind``."""

    def __init__(self, name: str, kind: type[PackedWeight]) -> None:
        self.linear, self.dgrad, self.dequantize = f"{name}_linear", f"{name}_linear_dgrad", f"dequantize_{name}"
        self.kind = kind

    def example_args(
        self,
        device: torch.device | str,
        *,
        m: int = 3,
        n: int = 96,
        k: int = 256,
        group: int = 64,
        dtype: torch.dtype = torch.bfloat16,
    ) -> dict[str, tuple[Any, ...]]:
        """Arguments for each op by its name, the same on every call.

        Args:
            m, n, k: tokens, output and input features; group: columns that share a scale.
            dtype: of the activations.

        Raises:
            ValueError: the group size does not divide ``k``, or not into whole words.
        """
        if group < 1 or k % group:
            raise ValueError(f"group size {group} does not divide K = {k}")
        if group % self.kind.unit():
            bits, unit = self.kind.bits, self.kind.unit()
            raise ValueError(f"group size {group} is not a multiple of {unit}, as weights of {bits} bits need")
        generator = torch.Generator().manual_seed(0)
        integers = torch.randint(0, 1 << self.kind.bits, (n, k), generator=generator)
        zeros = torch.randint(0, 1 << self.kind.bits, (n, k // group), generator=generator)
        scales = torch.rand(n, k // group, generator=generator) * 0.02 + 0.01
        weight = self.kind.from_integers(integers, scales, zeros).to(device).tensors
        x, grad, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (m, n), (n,)))
        return {self.linear: (x, *weight, bias), self.dgrad: (grad, *weight), self.dequantize: (*weight, dtype)}

    def peer(self, op: str, args: tuple[Any, ...]) -> tuple[str, Callable[..., Tensor], tuple[Tensor, ...]] | None:
        """What people run who have the weight in 16 bits: a name, the function and its operands; None for none."""
        if op == self.dequantize:
            return None
        x, *weight = args
        bias = (weight.pop(),) if op == self.linear else ()
        packed = self.kind(*weight)
        dense = dequantize(packed.integers(), packed.scales, packed.zeros, x.dtype)
        kind = str(x.dtype).removeprefix("torch.")
        if op == self.linear:
            return f"F.linear {kind}", F.linear, (x, dense, *bias)
        return f"torch.matmul {kind}", torch.matmul, (x, dense)
