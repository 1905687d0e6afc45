"""Pooling of points in boxes on a CPU, compiled by numba: one box after another."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase


def roi_aware_pool(
    rois: Tensor, points: Tensor, feats: Tensor, pooled: Tensor, source: Tensor, members: Tensor, mode: str
) -> None:
    from . import cpu_kernels as kernels

    count, (rows, channels) = len(rois), feats.shape
    _, *out_size, max_points = members.shape
    if count:
        rois, points, values = rois.contiguous(), points.contiguous(), feats.float().contiguous()
        cosine, sine = _turns(rois)
        wide = pooled if pooled.dtype == torch.float32 else torch.zeros(pooled.shape)
        Launch(Phase(kernels.pool_cells.address, count))(
            rois.data_ptr(), count, cosine.data_ptr(), sine.data_ptr(), points.data_ptr(), rows, values.data_ptr(),
            channels, *out_size, max_points, mode == "max", wide.data_ptr(), source.data_ptr(), members.data_ptr(),
        )  # fmt: skip
        if wide is not pooled:
            pooled.copy_(wide)


def points_in_rois(points: Tensor, rois: Tensor, samples: int) -> Tensor:
    from . import cpu_kernels as kernels

    clouds, boxes = rois.shape[:2]
    found = torch.full((clouds, boxes, samples), -1, dtype=torch.int32)
    if found.numel():
        rois, points = rois.contiguous(), points.contiguous()
        cosine, sine = _turns(rois)
        Launch(Phase(kernels.first_inside.address, clouds * boxes))(
            rois.data_ptr(), clouds * boxes, cosine.data_ptr(), sine.data_ptr(), points.data_ptr(), points.shape[1],
            clouds, samples, found.data_ptr(),
        )  # fmt: skip
    return found


def _turns(rois: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles that turn points as their boxes are turned back."""
    angle = -rois[..., 6]
    return angle.cos().contiguous(), angle.sin().contiguous()


def supports_roi_aware_pool(
    rois: Tensor, points: Tensor, feats: Tensor, pooled: Tensor, source: Tensor, members: Tensor, mode: str
) -> str | None:
    if not (pooled.is_contiguous() and source.is_contiguous() and members.is_contiguous()):
        return "what is written to is not contiguous"
    if torch.float64 in (rois.dtype, feats.dtype):
        return "float64 is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


def supports_points_in_rois(points: Tensor, *_: object) -> str | None:
    if points.dtype == torch.float64:
        return "float64 is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"
