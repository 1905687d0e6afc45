"""Arguments for the ops of products of pairs, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.sparse.grids import starts_of
from kernelgraft_core.sparse.samples import sample_values

TUNED: tuple[str, ...] = ()
PAIRS, RELATIONS, ROWS, CIN, COUT = 400, 7, 60, 32, 48


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(RELATIONS, (PAIRS,), generator=generator), minlength=RELATIONS)
    starts = starts_of(counts).to(device)
    inputs, outputs = (torch.randint(ROWS, (PAIRS,), generator=generator).to(device) for _ in range(2))
    x, weight, grad = (
        sample_values(*shape, device=device, dtype=dtype, seed=i)
        for i, shape in enumerate(((ROWS, CIN), (RELATIONS, 1, CIN, COUT), (ROWS, COUT)))
    )
    return {
        "pair_gemm": (x, weight, inputs, outputs, starts, None, ROWS),
        "pair_gemm_wgrad": (x, grad, inputs, outputs, starts, None, 1),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers; see ``benchmarks/sparse_cases.py``."""
