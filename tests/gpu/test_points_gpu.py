"""Point clouds on a GPU: every op against the CPU, on what is exact in any order of operations, and gradients."""

import pytest
import torch

from kernelgraft_core import points as clouds
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6, torch.float64: 1e-13}


def lattice(*shape, most=40):
    """Eighths: squared distances are exact, fused or not, and many are equal."""
    return torch.randint(-most, most, (*shape, 3)).float() / 8


def same(function, *tensors, **options):
    """Equal on both devices, and each time."""
    device = torch.device("cuda")
    here = function(*tensors, **options)
    there = [function(*(each.to(device) for each in tensors), **options) for _ in range(2)]
    for each in there:
        pairs = zip(here, each, strict=True) if isinstance(here, tuple) else [(here, each)]
        for wanted, found in pairs:
            assert found.device.type == "cuda"
            assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_voxels(dtype, device):
    points = (torch.randn(20_000, 4) * 2).to(dtype)
    points[5, 1], points[77, 2] = float("nan"), float("inf")
    how = {"voxel_size": (0.11, 0.3, 0.7), "point_range": (-3, -2, -1.5, 2.7, 3.1, 1.9)}
    same(clouds.dynamic_voxelize, points, **how)
    same(clouds.hard_voxelize, points, **how, max_points=5, max_voxels=3000)


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("channels", [1, 5, 64, 200])
def test_scatter(channels, reduce, dtype, device):
    coordinates = torch.randint(-1, 9, (5000, 3), dtype=torch.int32)
    feats = (torch.randint(-99, 99, (5000, channels)) / 16).to(dtype)

    def run(where):
        leaf = feats.to(where).requires_grad_()
        out, *rest = clouds.scatter_points(leaf, coordinates.to(where), reduce)
        grad = torch.arange(out.numel()).view(out.shape).remainder(17).to(where, dtype)
        return [out.detach(), torch.autograd.grad(out, leaf, grad)[0], *rest]

    here, there = run("cpu"), run(device)
    assert_close("y", here[0], there[0], 0 if reduce == "max" else RATIO[dtype])
    assert_close("grad", here[1], there[1], 0 if reduce == "max" else RATIO[dtype])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here[2:], there[2:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(there, run(device), strict=True))


@pytest.mark.parametrize(
    ("count", "samples"), [(1, 3), (100, 60), (4096, 500), (8192, 300), (8193, 100), (60_000, 100)]
)
def test_furthest_points(count, samples, device):
    same(clouds.furthest_point_sampling, lattice(3, count, most=400), samples=samples)


@pytest.mark.parametrize(("count", "samples"), [(1, 3), (300, 60), (5000, 100)])
def test_furthest_points_by_distance(count, samples, device):
    points = lattice(2, count)
    distances = torch.stack([(each.unsqueeze(1) - each).square().sum(2) for each in points])
    same(clouds.furthest_point_sampling_with_distances, distances, samples=samples)


@pytest.mark.parametrize("neighbors", [1, 3, 16, 100, 200])
@pytest.mark.parametrize("count", [1, 50, 3000])
def test_nearest(count, neighbors, device):
    points, centers = lattice(2, count), lattice(2, 333)
    points[0, 0, 1] = float("nan")
    same(clouds.knn, points, centers, neighbors=neighbors)


@pytest.mark.parametrize(
    "how", [(0.5, 16), (2.0, 32, 1.0), (100.0, 700)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 50, 3000])
def test_within(count, how, device):
    max_radius, samples, *low = how
    points, centers = lattice(2, count), lattice(2, 333)
    points[0, 0, 1] = float("nan")
    options = {"max_radius": max_radius, "samples": samples, "min_radius": low[0] if low else 0.0}
    same(clouds.ball_query, points, centers, **options)


def test_clouds_one_after_another(device):
    counts = torch.tensor([500, 0, 1, 700]), torch.tensor([20, 3, 5, 90])
    points, centers = lattice(1201), lattice(118)
    same(lambda p, c, *n: clouds.knn(p, c, 5, *n), points, centers, *counts)
    same(lambda p, c, *n: clouds.ball_query(p, c, 1.0, 9, 0.0, *n), points, centers, *counts)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_boxes(mode, device):
    rois = torch.cat((lattice(30), torch.full((30, 3), 3.1875), torch.zeros(30, 1)), 1)
    points, feats = lattice(3000), torch.randint(-99, 99, (3000, 7)) / 16

    def run(where):
        leaf = feats.to(where).requires_grad_()
        out, *rest = clouds.roi_aware_pool(rois.to(where), points.to(where), leaf, (3, 2, 3), 20, mode)
        return [out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0], *rest]

    here, there = run("cpu"), run(device)
    for wanted, found in zip(here, there, strict=True):
        assert_close("boxes", wanted, found, 1e-6 if wanted.is_floating_point() else 0)
    assert all(torch.equal(a, b) for a, b in zip(there, run(device), strict=True))
    same(lambda p, f, r: clouds.roi_point_pool(p, f, r, 40), points[None], feats[None], rois[None])


def test_groups(device):
    feats, index = torch.randn(2, 16, 300), torch.randint(300, (2, 50, 9), dtype=torch.int32)
    weight = torch.rand(2, 50, 9)
    scores, bank = torch.randn(2, 50, 9, 4), torch.randn(2, 300, 4, 6)
    counts, members = torch.tensor([100, 200]), torch.tensor([30, 20])

    def run(where):
        leaves = [each.to(where).requires_grad_() for each in (feats, weight, scores, bank)]
        at = index.to(where)
        out = (
            clouds.gather_points(leaves[0], at),
            clouds.three_interpolate(leaves[0], at, leaves[1]),
            clouds.assign_scores(leaves[2], leaves[3], leaves[3] * 2, at),
            clouds.group_stacked_points(leaves[0][0].t(), at[0], counts.to(where), members.to(where)),
        )
        total = sum(each.square().sum() for each in out)
        return [*(each.detach() for each in out), *torch.autograd.grad(total, leaves)]

    there = run(device)
    for i, (wanted, found) in enumerate(zip(run("cpu"), there, strict=True)):
        assert_close(str(i), wanted, found, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(there[4:], run(device)[4:], strict=True))


def test_chamfer(device):
    same(clouds.chamfer_distance, lattice(2, 700)[..., :2].contiguous(), lattice(2, 90)[..., :2].contiguous())
