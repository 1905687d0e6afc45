"""mmcv's voxelization and dynamic scatter on our ops: what compiled mmcv 2.1 computes."""

import numpy as np
import pytest
import torch
from mmcv.ops import DynamicScatter, Voxelization, dynamic_scatter, voxelization

from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_openmmlab.ext import voxelization as ext

RANGE, SIZE = (-2.0, -1.5, -1.0, 2.1, 1.5, 1.2), (0.3, 0.2, 0.55)


def cells_of(points):
    """mmcv's loop in float32, with its rounding of the grid; -1 outside."""
    low, high, size = np.float32(RANGE[:3]), np.float32(RANGE[3:]), np.float32(SIZE)
    grid = np.floor(((high - low) / size).astype(np.float64) + 0.5)
    with np.errstate(invalid="ignore", over="ignore"):
        cells = np.floor((points.numpy()[:, :3] - low) / size)
    inside = ((cells >= 0) & (cells < grid)).all(1)
    return torch.from_numpy(np.where(inside[:, None], cells, -1).astype(np.int32)[:, ::-1].copy())


def cloud(count=900, channels=4):
    points = torch.randn(count, channels)
    points[3, 0], points[70, 2], points[71, 1] = float("nan"), float("inf"), -3e38
    return points


@pytest.mark.parametrize(("most", "voxels"), [(5, 2000), (1, 40), (35, 7)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_hard_voxelization(most, voxels, deterministic):
    points = cloud()
    rows = {}
    for i, cell in enumerate(map(tuple, cells_of(points).tolist())):
        if cell[0] >= 0 and (cell in rows or len(rows) < voxels):
            rows.setdefault(cell, []).append(i)
    found = Voxelization(SIZE, RANGE, most, voxels, deterministic)(points)
    wanted = torch.zeros(len(rows), most, 4)
    for place, members in zip(wanted, rows.values(), strict=True):
        place[: len(members[:most])] = points[members[:most]]
    assert torch.equal(found[0], wanted)
    assert torch.equal(found[1], torch.tensor(list(rows), dtype=torch.int32))
    assert torch.equal(found[2], torch.tensor([min(most, len(m)) for m in rows.values()], dtype=torch.int32))


def test_dynamic_voxelization():
    points = cloud()
    found = Voxelization(SIZE, RANGE, -1)(points)
    assert found.dtype == torch.int32
    assert torch.equal(found, cells_of(points))
    assert (found[:, 0] < 0).any()
    assert (found[:, 0] >= 0).any()


@pytest.mark.parametrize("points", [torch.zeros(0, 4), torch.full((3, 4), 90.0), torch.zeros(1, 5)], ids=str)
def test_few_points(points):
    voxels, coordinates, counts = voxelization(points, SIZE, RANGE, 5, 10, True)
    many = int((cells_of(points)[:, 0] >= 0).any())
    assert voxels.shape == (many, 5, points.shape[1])
    assert coordinates.shape == (many, 3)
    assert counts.tolist() == [1] * many
    assert torch.equal(voxelization(points, SIZE, RANGE, -1, -1), cells_of(points))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_dynamic_scatter(reduce, dtype):
    feats = (torch.randint(-9, 9, (400, 6)) / 4).to(dtype).requires_grad_()
    coordinates = torch.randint(-1, 4, (400, 3), dtype=torch.int32)
    out, sites = dynamic_scatter(feats, coordinates, reduce)
    exact = feats.detach().double().requires_grad_()
    wanted_sites = sorted({tuple(c) for c in coordinates.tolist() if min(c) >= 0})
    assert sites.tolist() == [list(c) for c in wanted_sites]
    rows = []
    for site in wanted_sites:
        members = exact[(coordinates == torch.tensor(site)).all(1)]
        if reduce == "max":  # the first of those that are equal: what argmax of ones gives
            first = (members == members.amax(0)).int().argmax(0)
            rows.append(members.gather(0, first.unsqueeze(0)).squeeze(0))
        else:
            rows.append(getattr(members, reduce)(0))
    wanted = torch.stack(rows)
    ratio = 0 if reduce == "max" else 1e-6
    assert_close("feats", wanted, out, ratio)
    grad = torch.randn(out.shape, dtype=dtype)
    right, found = torch.autograd.grad(wanted, exact, grad.double()), torch.autograd.grad(out, feats, grad)
    assert_close("grad", right[0], found[0], ratio)


def test_maps_and_counts():
    coordinates = torch.tensor([[2, 0, 1], [-1, 5, 5], [0, 0, 3], [2, 0, 1], [4, -2, 0]], dtype=torch.int32)
    feats = torch.arange(10.0).view(5, 2)
    out, sites, rows, counts = ext.dynamic_point_to_voxel_forward(feats, coordinates, "mean")
    assert sites.tolist() == [[0, 0, 3], [2, 0, 1]]
    assert rows.tolist() == [1, -1, 0, 1, -1]
    assert counts.tolist() == [1, 2]
    assert out.tolist() == [[4, 5], [3, 4]]
    assert sites.dtype == rows.dtype == counts.dtype == torch.int32


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_scatter_of_nothing(count, reduce):
    feats, coordinates = torch.randn(count, 3, requires_grad=True), torch.full((count, 3), -1, dtype=torch.int32)
    out, sites = dynamic_scatter(feats, coordinates, reduce)
    assert out.shape == sites.shape == (0, 3)
    out.sum().backward()
    assert torch.equal(feats.grad, torch.zeros(count, 3))


def test_scatter_of_batches():
    points, coordinates = torch.randn(200, 4), torch.randint(0, 3, (200, 4), dtype=torch.int32)
    coordinates[:, 0] = torch.arange(200) // 120
    out, sites = DynamicScatter(SIZE, RANGE, True)(points, coordinates)
    for row, site in zip(out, sites, strict=True):
        torch.testing.assert_close(row, points[(coordinates == site).all(1)].mean(0), rtol=1e-5, atol=1e-6)
    assert len(sites) == len(coordinates.unique(dim=0))


def test_voxelization_of_mmdet3d():
    voxelize = pytest.importorskip("mmdet3d.models.data_preprocessors.voxelize")
    points = cloud()
    layer = voxelize.VoxelizationByGridShape(RANGE, -1, grid_shape=[15, 16, 5])
    assert layer(points).shape == (900, 3)
    coordinates = cells_of(points)
    out, sites, rows = voxelize.dynamic_scatter_3d(points.nan_to_num(), coordinates, "max", True)
    inside = rows >= 0
    assert torch.equal(sites[rows[inside].long()], coordinates[inside])
    assert torch.equal(inside, coordinates[:, 0] >= 0)
    assert len(out) == len(sites)
