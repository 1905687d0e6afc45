"""mmdet3d's voxelization without a GPU, of scans without points, and of points that are not finite.

Its detectors read the number of samples off the last voxel: a last sample without any is lost, and a batch without any
fails. Its segmentors round coordinates that may be NaN to integers, which gives anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelgraft_core.runtime.notices import warn_once
from kernelgraft_core.runtime.patching import Patches


def _repair(patches: Patches, module: ModuleType) -> None:
    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(theirs)
        def voxelize(self: Any, points: list[Tensor], data_samples: list[Any]) -> dict[str, Tensor]:
            if self.voxel_type in ("hard", "dynamic"):
                _fill_empty(points, self.voxel_layer.point_cloud_range)
            else:
                _refuse_unusable(points)
            if self.voxel_type == "minkunet" and points and points[0].device.type == "cpu":
                return _minkunet_voxels(self, points, data_samples)
            voxels: dict[str, Tensor] = theirs(self, points, data_samples)
            return voxels

        return voxelize

    patches.wrap(module.Det3DDataPreprocessor, "voxelize", make)


def _fill_empty(points: list[Tensor], limits: Any) -> None:
    """Leave out points that are not finite; give a sample without points in range one at the range's corner.

    In the list itself, so that two-stage detectors, which look at the points again, see the same.
    """
    for sample, cloud in enumerate(points):
        finite = cloud.isfinite().all(1)  # of all columns: one intensity that is NaN spreads over the whole scan
        if not bool(finite.all()):
            warn_once("a scan has points that are not finite, in their place or in their features: they are left out")
            points[sample] = cloud = cloud[finite]
        low, high = cloud.new_tensor(limits).view(2, 3)
        if bool(((cloud[:, :3] >= low) & (cloud[:, :3] < high)).all(1).any()):
            continue
        warn_once(
            f"a scan has no points within {[float(each) for each in limits]}: it is detected in as if it had one, at "
            "the corner of that range"
        )
        corner = cloud.new_zeros((1, cloud.shape[1]))
        corner[0, :3] = low
        points[sample] = corner


def _refuse_unusable(points: list[Tensor]) -> None:
    for sample, cloud in enumerate(points):
        if not len(cloud):
            raise ValueError(f"sample {sample} of the batch has no points: there is nothing to give a class to")
        finite = cloud.isfinite().all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"point {row} of sample {sample} is {cloud[row].tolist()}: drop what is not finite, every point "
                "is to be given a class"
            )


def _minkunet_voxels(self: Any, points: list[Tensor], data_samples: list[Any]) -> dict[str, Tensor]:
    """One point of each voxel, in the order of voxels; the coordinates of a sample begin at 0."""
    voxels, sites = [], []
    for sample, (cloud, data) in enumerate(zip(points, data_samples, strict=True)):
        cells = torch.round(cloud[:, :3] / cloud.new_tensor(self.voxel_layer.voxel_size)).int()
        cells -= cells.min(0)[0]
        kept, voxel_of = self.sparse_quantize(cells.numpy(), return_index=True, return_inverse=True)
        if self.training and self.max_voxels is not None and len(kept) > self.max_voxels:
            kept = np.random.choice(kept, self.max_voxels, replace=False)
        rows = torch.from_numpy(kept)
        if hasattr(data.gt_pts_seg, "pts_semantic_mask"):
            data.gt_pts_seg.voxel_semantic_mask = data.gt_pts_seg.pts_semantic_mask[rows]
        pad, column = ((1, 0), 0) if self.batch_first else ((0, 1), -1)
        site = torch.nn.functional.pad(cells[rows], pad, value=sample)
        data.batch_idx = site[:, column]
        data.point2voxel_map = torch.from_numpy(voxel_of).long()
        voxels.append(cloud[rows])
        sites.append(site)
    return {"voxels": torch.cat(voxels), "coors": torch.cat(sites)}


REPAIRS = {"mmdet3d.models.data_preprocessors.data_preprocessor": _repair}
