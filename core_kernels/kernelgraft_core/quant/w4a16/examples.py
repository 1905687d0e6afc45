"""Small arguments for every op of the family, for reports and for tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from .weight import W4A16Weight

ROWS, K, N, GROUP = 3, 256, 96, 64


def example_args(device: torch.device | str) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call: bfloat16, K = 256, N = 96, groups of 64."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (N, K), generator=generator)
    zeros = torch.randint(0, 16, (N, K // GROUP), generator=generator)
    scales = torch.rand(N, K // GROUP, generator=generator) * 0.02 + 0.01
    packed = W4A16Weight.from_integers(integers, scales, zeros)
    weight = W4A16Weight(*(t.to(device) for t in (packed.qweight, packed.scales, packed.zeros))).arranged()
    x, grad, bias = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in ((ROWS, K), (ROWS, N), (N,))
    )
    tensors = (weight.qweight, weight.scales, weight.zeros)
    return {
        "w4a16_linear": (x, *tensors, bias),
        "w4a16_linear_dgrad": (grad, *tensors),
        "dequantize_w4a16": (*tensors, torch.bfloat16),
    }
