"""Arguments for the ops of sparse convolution, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.sparse.samples import sample_map, sample_values

TUNED: tuple[str, ...] = ()
CHANNELS = 32, 48


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    neighbors, (cin, cout) = sample_map(device).neighbors, CHANNELS
    rows, taps = neighbors.shape
    shapes = (rows, cin), (taps, 1, cin, cout), (cout,), (rows, cout)
    x, weight, bias, grad = (
        sample_values(*shape, device=device, dtype=dtype, seed=i) for i, shape in enumerate(shapes)
    )
    return {
        "sparse_conv": (x, weight, bias, neighbors, True, "relu", "auto"),
        "sparse_conv_dgrad": (grad, weight, neighbors, rows, True, "auto"),
        "sparse_conv_wgrad": (x, grad, neighbors, 1, "auto"),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers; see ``benchmarks/sparse_cases.py``."""
