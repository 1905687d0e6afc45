"""Arguments for the ops of attention in groups, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.point_attention.groups import cut

TUNED: tuple[str, ...] = ()
SAMPLES, GROUP_SIZE, CHANNELS, HEADS = (100, 0, 37), 32, 64, 4


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator, rows = torch.Generator().manual_seed(0), sum(SAMPLES)
    bounds = torch.tensor([0, *torch.tensor(SAMPLES).cumsum(0).tolist()])
    groups = cut(torch.randperm(rows, generator=generator), bounds, GROUP_SIZE, "overlap").to(device)
    c, weight = CHANNELS, CHANNELS**-0.5
    shapes = (rows, c), (rows, c), (3 * c, c), (3 * c,), (c, c), (c,), (rows, 3 * c)
    scales = 1, 1, weight, 1, weight, 1, 1
    x, position, in_weight, in_bias, out_weight, out_bias, qkv = (
        torch.randn(shape, generator=generator).mul(factor).to(device, dtype)
        for shape, factor in zip(shapes, scales, strict=True)
    )
    rest = *groups.tensors, HEADS, groups.size
    return {
        "grouped_attention": (qkv, *rest),
        "grouped_attention_grad": (x, qkv, *rest),
        "grouped_self_attention": (x, position, in_weight, in_bias, out_weight, out_bias, *rest),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers; see ``benchmarks/flatformer_cases.py``."""
