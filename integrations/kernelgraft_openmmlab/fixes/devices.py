"""Where mmcv and mmdet3d ask for a GPU by name, tensors on a CPU go another way; those on a GPU go theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelgraft_core.runtime.patching import Patches

from .rebinding import replace_everywhere

Function = Callable[..., Any]


def _on_cpu(ours: Function, which: int = 0) -> Callable[[Function], Function]:
    """Replaces a function by ``ours`` for calls whose argument ``which`` is a tensor on the CPU."""

    def make(theirs: Function) -> Function:
        @functools.wraps(theirs)
        def choose(*args: Any, **kwargs: Any) -> Any:
            tensor = args[which] if len(args) > which else next(iter(kwargs.values()))
            return (ours if tensor.device.type == "cpu" else theirs)(*args, **kwargs)

        return choose

    return make


def _sampling(patches: Patches, module: ModuleType) -> None:
    def forward(ctx: Any, points_xyz: Tensor, num_points: int) -> Tensor:
        batch, count, _ = points_xyz.shape
        found = points_xyz.new_empty((batch, num_points), dtype=torch.int32)
        nearest = points_xyz.new_full((batch, count), 1e10)
        module.ext_module.furthest_point_sampling_forward(
            points_xyz.contiguous(), nearest, found, b=batch, n=count, m=num_points
        )
        ctx.mark_non_differentiable(found)
        return found

    patches.wrap(module.FurthestPointSampling, "forward", _on_cpu(forward, 1))


def _boxes(patches: Patches, module: ModuleType) -> None:
    def check(points: Tensor, boxes: Tensor) -> None:
        if points.dim() != 3 or points.shape[2] != 3 or boxes.shape != (len(points), boxes.shape[-2], 7):
            raise ValueError(
                f"points are {tuple(points.shape)} and boxes {tuple(boxes.shape)}, expected (B, M, 3) and (B, T, 7)"
            )

    def part(points: Tensor, boxes: Tensor) -> Tensor:
        check(points, boxes)
        found = points.new_full(points.shape[:2], -1, dtype=torch.int32)
        module.ext_module.points_in_boxes_part_forward(boxes.contiguous(), points.contiguous(), found)
        return found

    def every(points: Tensor, boxes: Tensor) -> Tensor:
        check(points, boxes)
        found = points.new_zeros((*points.shape[:2], boxes.shape[1]), dtype=torch.int32)
        module.ext_module.points_in_boxes_all_forward(boxes.contiguous(), points.contiguous(), found)
        return found

    replace_everywhere(patches, module, "points_in_boxes_part", _on_cpu(part))
    replace_everywhere(patches, module, "points_in_boxes_all", _on_cpu(every))


def _neighbours(patches: Patches, module: ModuleType) -> None:
    def forward(ctx: Any, k: int, xyz: Tensor, center_xyz: Tensor | None = None, transposed: bool = False) -> Tensor:
        if not 0 < k < 100:
            raise ValueError(f"k is {k}, expected 1 to 99")
        centers = xyz if center_xyz is None else center_xyz
        if transposed:
            xyz, centers = xyz.transpose(1, 2), centers.transpose(1, 2)
        batch, queries, _ = centers.shape
        found = centers.new_zeros((batch, queries, k), dtype=torch.int32)
        squares = centers.new_zeros((batch, queries, k), dtype=torch.float32)
        module.ext_module.knn_forward(
            xyz.contiguous(), centers.contiguous(), found, squares, b=batch, n=xyz.shape[1], m=queries, nsample=k
        )
        found = found.transpose(1, 2).contiguous()
        ctx.mark_non_differentiable(found)
        return found

    patches.wrap(module.KNN, "forward", _on_cpu(forward, 2))


def _camera_boxes(patches: Patches, module: ModuleType) -> None:
    """Boxes of a camera, of nuScenes' own kind, for the metric."""

    def make(theirs: Function) -> Function:
        @functools.wraps(theirs)
        def nusc_boxes(boxes: list[Any]) -> tuple[Any, Tensor, Tensor]:
            if torch.cuda.is_available():
                found: tuple[Any, Tensor, Tensor] = theirs(boxes)
                return found
            place = torch.tensor(np.array([box.center for box in boxes])).float().view(-1, 3)
            size = torch.tensor(np.array([box.wlh for box in boxes])).float().view(-1, 3)[:, [1, 2, 0]]
            yaw = -torch.tensor([box.orientation.yaw_pitch_roll[0] for box in boxes]).float().view(-1, 1)
            velocity = torch.tensor(np.array([box.velocity[0::2] for box in boxes])).float().view(-1, 2)
            whole = torch.cat((place, size, yaw, velocity), 1)
            labels = torch.tensor([box.label for box in boxes], dtype=torch.int64)
            scores = torch.zeros(len(boxes), 11)
            scores[torch.arange(len(boxes)), labels] = torch.tensor([box.score for box in boxes]).float()
            return module.CameraInstance3DBoxes(whole, box_dim=9, origin=(0.5, 0.5, 0.5)), scores, labels

        return nusc_boxes

    replace_everywhere(patches, module, "nusc_box_to_cam_box3d", make)


REPAIRS = {
    "mmcv.ops.furthest_point_sample": _sampling,
    "mmcv.ops.points_in_boxes": _boxes,
    "mmcv.ops.knn": _neighbours,
    "mmdet3d.evaluation.metrics.nuscenes_metric": _camera_boxes,
}
