"""Arguments for the ops of kernel maps, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.sparse.samples import sample_map

TUNED: tuple[str, ...] = ()


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    known = sample_map(device)
    keys = known.inputs.keys((1, 1, 1))
    lines = [dx * keys.steps[1] + dy * keys.steps[2] - 1 for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    return {
        "sparse_neighbors": (keys.sorted, keys.order, keys.sorted, keys.order, lines, 3, 1),
        "sparse_transpose": (known.neighbors, len(known.inputs)),
        "sparse_keys": (known.inputs.indices, keys.order, list(keys.steps), 0),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers; see ``benchmarks/sparse_cases.py``."""
