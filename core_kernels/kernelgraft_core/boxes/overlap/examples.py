"""Arguments for the ops of overlaps, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.boxes.outlines import rotated_outlines
from kernelgraft_core.boxes.samples import flat, sample_boxes

from .reference import IOU

TUNED: tuple[str, ...] = ()


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    a, b = sample_boxes(60, device), sample_boxes(90, device, seed=1)
    return {
        "box_iou": (flat(a), flat(b), IOU, False, 0.0),
        "outline_overlap": (rotated_outlines(a), rotated_outlines(b), IOU, False, torch.float32),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
