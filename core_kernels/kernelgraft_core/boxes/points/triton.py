"""Points in boxes and polygons on a GPU: a block of points of one batch goes through all boxes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelgraft_core.boxes.overlap.triton import EXACT
from kernelgraft_core.boxes.triton_kernels import divide

BLOCK, WARPS = 128, 4


def points_in_boxes_all(points: Tensor, frames: Tensor) -> Tensor:
    out = torch.empty((*points.shape[:2], frames.shape[2]), dtype=torch.bool, device=points.device)
    return _run(boxes_kernel, points, frames, out, FIRST=False)


def points_in_boxes_first(points: Tensor, frames: Tensor) -> Tensor:
    out = torch.empty(points.shape[:2], dtype=torch.int32, device=points.device)
    return _run(boxes_kernel, points, frames, out, FIRST=True)


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    out = torch.empty((len(points), len(polygons)), dtype=torch.bool, device=points.device)
    return _run(polygons_kernel, points.unsqueeze(0), polygons.T.unsqueeze(0), out)


def _run(kernel: Any, points: Tensor, boxes: Tensor, out: Tensor, **constants: bool) -> Tensor:
    if out.numel():
        blocks = triton.cdiv(points.shape[1], BLOCK)
        with torch.cuda.device_of(points):
            kernel[points.shape[0] * blocks,](
                points.contiguous(), boxes.contiguous(), out.view(torch.int8) if out.dtype == torch.bool else out,
                points.shape[1], boxes.shape[2], blocks, BLOCK=BLOCK, num_warps=WARPS, **constants, **EXACT,
            )  # fmt: skip
    return out


@triton.jit
def boxes_kernel(points, frames, out, count, boxes, blocks, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """``points (B, M, 3)``, ``frames (B, 8, T)``; the first box of each point, or int8 ``(B, M, T)``."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = point < count
    row = batch * count + point
    at = points + row * 3
    x, y, z = tl.load(at, inside, 0.0), tl.load(at + 1, inside, 0.0), tl.load(at + 2, inside, 0.0)
    frame = frames + batch * boxes * 8
    found = tl.full((BLOCK,), -1, tl.int32)
    for box in range(boxes):
        away_x, away_y = x - tl.load(frame + box), y - tl.load(frame + boxes + box)
        away_z = z - tl.load(frame + 2 * boxes + box)
        cos, sin = tl.load(frame + 6 * boxes + box), tl.load(frame + 7 * boxes + box)
        along, across = away_x * cos + away_y * sin, away_y * cos - away_x * sin
        hit = (tl.abs(along) < tl.load(frame + 3 * boxes + box)) & (tl.abs(across) < tl.load(frame + 4 * boxes + box))
        hit = hit & (tl.abs(away_z) <= tl.load(frame + 5 * boxes + box))
        if FIRST:
            found = tl.where(hit & (found < 0), box, found)
        else:
            tl.store(out + row * boxes + box, hit.to(tl.int8), inside)
    if FIRST:
        tl.store(out + row, found, inside)


@triton.jit
def polygons_kernel(points, polygons, out, count, boxes, blocks, BLOCK: tl.constexpr):
    """``points (M, 2)``, ``polygons (8, T)``; int8 ``(M, T)``."""
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = point < count
    px, py = tl.load(points + 2 * point, inside, 0.0), tl.load(points + 2 * point + 1, inside, 0.0)
    for box in range(boxes):
        odd, going = tl.zeros((BLOCK,), tl.int1), tl.full((BLOCK,), 1, tl.int1)
        tx, ty = tl.load(polygons + 6 * boxes + box), tl.load(polygons + 7 * boxes + box)
        for edge in tl.static_range(4):
            sx, sy = tl.load(polygons + 2 * edge * boxes + box), tl.load(polygons + (2 * edge + 1) * boxes + box)
            corner = ((sx == px) & (sy == py)) | ((tx == px) & (ty == py))
            crosses = ((sy < py) & (ty >= py)) | ((sy >= py) & (ty < py))
            rise = tl.where(ty == sy, 1.0, ty - sy)
            run = (py - sy) * (tx - sx)
            x = sx + divide(run, rise + tl.zeros_like(run))
            going = going & (corner == 0) & ((crosses & (x == px)) == 0)
            odd = odd ^ (going & crosses & (x > px))
            tx, ty = sx, sy
        tl.store(out + point * boxes + box, odd.to(tl.int8), inside)


def supports_points_in_boxes_all(points: Tensor, frames: Tensor) -> str | None:
    return None


supports_points_in_boxes_first = supports_points_in_polygons = supports_points_in_boxes_all
