"""Arguments for the ops of suppression, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.boxes.outlines import rotated_outlines
from kernelgraft_core.boxes.samples import flat, sample_boxes

TUNED: tuple[str, ...] = ()


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    boxes = sample_boxes(200, device)
    return {
        "nms_boxes": (flat(boxes), None, 0.5, False, 0.0),
        "nms_outlines": (rotated_outlines(boxes), None, 0.5, False, True),
        "nms_match": (flat(boxes), 0.5),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
