"""The plainest correct pooling of points in boxes, on any device: every point is compared with every box."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.points.sums import sum_numbers, sum_rows
from kernelgraft_core.sparse.grids import starts_of

LARGEST_TABLE = 1 << 23  # points times boxes that are compared at once, at some 30 bytes each


def roi_aware_pool(
    rois: Tensor, points: Tensor, feats: Tensor, pooled: Tensor, source: Tensor, members: Tensor, mode: str
) -> None:
    _, *out_size, max_points = members.shape
    (count, channels), cells = (len(rois), feats.shape[1]), out_size[0] * out_size[1] * out_size[2]
    roi, point, *local = _members(points, rois)
    cell = torch.zeros_like(roi)
    for axis, size in enumerate(out_size):
        extent = rois[roi, 3 + axis]
        offset = local[axis] + extent / 2 if axis < 2 else points[point, 2] - rois[roi, 2]
        place = (offset / (extent / size)).nan_to_num(0).clamp(0, size - 1).long()
        cell = cell * size + place
    voxel, order = (roi * cells + cell).sort(stable=True)
    point = point[order]
    starts = starts_of(torch.bincount(voxel, minlength=count * cells))
    rank = torch.arange(len(voxel), device=voxel.device) - starts[voxel]
    kept = rank < max_points - 1
    voxel, point, rank = voxel[kept], point[kept], rank[kept]
    sizes = torch.bincount(voxel, minlength=count * cells)
    held = torch.zeros((count * cells, max_points), dtype=torch.int32, device=feats.device)
    held[voxel, rank + 1] = point.int()
    held[:, 0] = sizes.int()
    members.copy_(held.view(members.shape))
    values = feats[point].to(torch.promote_types(feats.dtype, torch.float32))
    if mode == "max":
        index = voxel.unsqueeze(1).expand(-1, channels)
        known = torch.where(values.isnan(), -torch.inf, values)
        best = values.new_full((count * cells, channels), -torch.inf).scatter_reduce(0, index, known, "amax")
        has = (values == best[voxel]) & (values > -torch.inf)
        rows = torch.where(has, point.unsqueeze(1), len(feats))
        found = point.new_full((count * cells, channels), len(feats)).scatter_reduce(0, index, rows, "amin")
        found = torch.where(found == len(feats), -1, found)
        source.copy_(found.view(source.shape))
        pooled.copy_(torch.where(found < 0, 0, best).view(pooled.shape))
    else:
        total = values.new_zeros((count * cells, channels)).index_put((voxel,), values, accumulate=True)
        pooled.copy_((total / sizes.clamp(min=1).unsqueeze(1)).view(pooled.shape))


def roi_aware_gradient(grad: Tensor, source: Tensor, members: Tensor, points: int, mode: str) -> Tensor:
    channels = grad.shape[-1]
    if mode == "max":
        taken = source >= 0
        place = (source.long() * channels + torch.arange(channels, device=grad.device))[taken]
        return sum_numbers(grad[taken], place, points * channels).view(points, channels)
    cells, counts = members[..., 1:].flatten(0, 3), members[..., 0].flatten()
    there = torch.arange(cells.shape[1], device=grad.device) < counts.unsqueeze(1)
    cell = there.nonzero()[:, 0]
    shares = grad.flatten(0, 3)[cell] / counts[cell].unsqueeze(1).to(grad.dtype)
    return sum_rows(shares, cells[there], points)


def points_in_rois(points: Tensor, rois: Tensor, samples: int) -> Tensor:
    clouds, boxes = rois.shape[:2]
    found = torch.full((clouds, boxes, samples), -1, dtype=torch.int32, device=points.device)
    slots = torch.arange(samples, device=points.device)
    for cloud in range(clouds):
        roi, point, _, _ = _members(points[cloud], rois[cloud])
        if len(point):
            starts = starts_of(torch.bincount(roi, minlength=boxes))
            count = starts.diff().unsqueeze(1)
            place = starts[:-1].unsqueeze(1) + slots % count.clamp(1, samples)
            found[cloud] = torch.where(count > 0, point[place.clamp(max=len(point) - 1)], -1).int()
    return found


def _members(points: Tensor, rois: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Box and point of every point in a box, points ascending in each, and x and y as the box sees them."""
    parts, step = [], max(1, LARGEST_TABLE // max(1, len(points)))
    for begin in range(0, max(1, len(rois)), step):
        inside, (x, y) = _inside(points, rois[begin : begin + step])
        roi, point = inside.nonzero().unbind(1)
        parts.append((roi + begin, point, x[roi, point], y[roi, point]))
    roi, point, x, y = (torch.cat(each) for each in zip(*parts, strict=True))
    return roi, point, x, y


def _inside(points: Tensor, rois: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which points are in which boxes ``(R, N)``, and x and y of points as boxes see them, from their centre."""
    centre, (dx, dy, dz), angle = rois[:, :3], rois[:, 3:6, None].unbind(1), -rois[:, 6:]
    away = points.unsqueeze(0) - centre.unsqueeze(1)
    cosine, sine = angle.cos(), angle.sin()
    x = away[..., 0] * cosine - away[..., 1] * sine
    y = away[..., 0] * sine + away[..., 1] * cosine
    middle = centre[:, 2:] + dz / 2
    inside = ((points[:, 2] - middle).abs() <= dz / 2) & (x > -dx / 2) & (x < dx / 2) & (y > -dy / 2) & (y < dy / 2)
    return inside, (x, y)
