"""mmcv's pooling of points in boxes on our ops: what compiled mmcv 2.1 computes."""

import math

import pytest
import torch
from mmcv.ops import RoIAwarePool3d, RoIPointPool3d

from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_openmmlab.ext import roi_points as ext


def boxes(count):
    return torch.cat((torch.randn(count, 3), torch.rand(count, 3) * 3 + 0.5, torch.rand(count, 1) * 9 - 4), 1)


def cell_of(point, roi, out_size):
    x, y, z, dx, dy, dz, angle = roi
    ax, ay = point[0] - x, point[1] - y
    u, v = ax * math.cos(angle) + ay * math.sin(angle), ay * math.cos(angle) - ax * math.sin(angle)
    if not (abs(u) < dx / 2 and abs(v) < dy / 2 and abs(point[2] - z - dz / 2) <= dz / 2):
        return None
    offset = (u + dx / 2) / dx, (v + dy / 2) / dy, (point[2] - z) / dz
    return tuple(min(int(o * n), n - 1) for o, n in zip(offset, out_size, strict=True))


def pooled_by_loop(rois, points, feats, out_size, most, mode):
    """Differentiable in the features; also the points of each cell."""
    cells, held = {}, {}
    for r, roi in enumerate(rois.double().tolist()):
        for i, point in enumerate(points.double().tolist()):
            if (cell := cell_of(point, roi, out_size)) is not None:
                members = held.setdefault((r, *cell), [])
                if len(members) < most - 1:
                    members.append(i)
    for key, members in held.items():
        values = feats[members]
        if mode == "max":
            first = (values == values.amax(0)).int().argmax(0)
            cells[key] = values.gather(0, first.unsqueeze(0)).squeeze(0)
        else:
            cells[key] = values.sum(0) / len(members)
    shape = (len(rois), *out_size)
    keys = torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist()
    nothing = feats.new_zeros(feats.shape[1])
    return torch.stack([cells.get(tuple(k), nothing) for k in keys]).view(*shape, -1), held


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(("out_size", "most"), [((3, 2, 4), 5), (2, 128)], ids=str)
def test_roi_aware_pool(out_size, most, mode):
    rois, points = boxes(5), torch.randn(200, 3)
    feats = (torch.randint(-9, 9, (200, 6)) / 4).requires_grad_()
    out = RoIAwarePool3d(out_size, most, mode)(rois, points, feats)
    exact = feats.detach().double().requires_grad_()
    wanted, held = pooled_by_loop(rois, points, exact, (out_size,) * 3 if out_size == 2 else out_size, most, mode)
    assert max(map(len, held.values())) > 2
    assert_close("pooled", wanted, out, 1e-6)
    grad = torch.randn(out.shape)
    right, found = torch.autograd.grad(wanted, exact, grad.double()), torch.autograd.grad(out, feats, grad)
    assert_close("grad", right[0], found[0], 1e-6)


def test_what_is_kept_for_the_way_back():
    rois, points, feats = boxes(4), torch.randn(150, 3), torch.randn(150, 3)
    _, held = pooled_by_loop(rois, points, feats, (2, 1, 3), 6, "max")
    argmax, kept = torch.full((4, 2, 1, 3, 3), 7, dtype=torch.int32), torch.zeros(4, 2, 1, 3, 6, dtype=torch.int32)
    ext.roiaware_pool3d_forward(rois, points, feats, argmax, kept, torch.zeros(4, 2, 1, 3, 3), pool_method=0)
    for r in range(4):
        for x, z in ((x, z) for x in range(2) for z in range(3)):
            members = held.get((r, x, 0, z), [])
            assert kept[r, x, 0, z].tolist() == [len(members), *members, *[0] * (5 - len(members))]
            wanted = torch.tensor(members)[feats[members].argmax(0)].tolist() if members else [-1] * 3
            assert argmax[r, x, 0, z].tolist() == wanted
    before = argmax.clone()
    ext.roiaware_pool3d_forward(rois, points, feats, argmax, kept, torch.zeros(4, 2, 1, 3, 3), pool_method=1)
    assert torch.equal(argmax, before)


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(("count", "points"), [(0, 9), (3, 0)])
def test_no_boxes_or_points(count, points, mode):
    feats = torch.randn(points, 4, requires_grad=True)
    out = RoIAwarePool3d(2, 8, mode)(boxes(count), torch.randn(points, 3), feats)
    assert torch.equal(out, torch.zeros(count, 2, 2, 2, 4))
    assert torch.autograd.grad(out.sum(), feats)[0].eq(0).all()


def test_roi_point_pool():
    rois = torch.stack((boxes(4), boxes(4)))
    rois[1, 3, 0] = 50.0
    points, feats = torch.randn(2, 120, 3), torch.randn(2, 120, 5)
    pooled, empty = RoIPointPool3d(20)(points, feats, rois)
    assert pooled.shape == (2, 4, 20, 8)
    assert empty.dtype == torch.int32
    assert empty[1, 3] == 1
    for b in range(2):
        for r, roi in enumerate(rois[b].double().tolist()):
            inside = [i for i, p in enumerate(points[b].double().tolist()) if cell_of(p, roi, (1, 1, 1))][:20]
            assert empty[b, r] == (not inside)
            rows = [inside[s % len(inside)] for s in range(20)] if inside else []
            wanted = torch.cat((points[b], feats[b]), 1)[rows] if inside else torch.zeros(20, 8)
            assert torch.equal(pooled[b, r], wanted)
