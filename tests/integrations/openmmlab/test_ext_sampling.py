"""mmcv's sampling on our ops: what compiled mmcv 2.1 computes, down to which of equally far points it takes."""

import math

import pytest
import torch
from mmcv.ops import furthest_point_sample_with_dist, gather_points

from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_openmmlab.ext import sampling as ext


def by_threads(points, samples, distances=False):
    """mmcv's kernel on one cloud, thread by thread, and its tree of comparisons."""
    count = len(points)
    threads = max(min(1 << int(math.log(count) / math.log(2)), 1024), 1)
    temp, found = torch.full((count,), 1e10), [0]
    for _ in range(1, samples):
        if distances:
            away = points[found[-1]]
        else:
            dx, dy, dz = (points - points[found[-1]]).unbind(1)
            away = dx * dx + dy * dy + dz * dz
        temp = torch.minimum(away, temp)
        best = []
        for thread in range(threads):
            value, index = -1.0, 0
            for k in range(thread, count, threads):
                if temp[k] > value:
                    value, index = float(temp[k]), k
            best.append((value, index))
        half = threads // 2
        while half:
            for thread in range(half):
                if best[thread + half][0] > best[thread][0]:
                    best[thread] = best[thread + half]
            half //= 2
        found.append(best[0][1])
    return found, temp


def clouds(count):
    return torch.randint(0, 4, (2, count, 3)).float()  # most distances are those of many pairs


@pytest.mark.parametrize(("count", "samples"), [(1, 2), (7, 5), (64, 40), (100, 60), (1500, 20)])
def test_furthest_points_and_which_of_equal_ones(count, samples):
    points = clouds(count)
    temp, found = torch.full((2, count), 1e10), torch.empty(2, samples, dtype=torch.int32)
    ext.furthest_point_sampling_forward(points, temp, found, b=2, n=count, m=samples)
    for cloud, rows, nearest in zip(points, found, temp, strict=True):
        wanted, distances = by_threads(cloud, samples)
        assert rows.tolist() == wanted
        assert torch.equal(nearest, distances)


def test_equal_ones_are_not_always_the_first():
    """Otherwise the test above would show nothing."""
    cloud = clouds(100)[0]
    from kernelgraft_core.points import furthest_point_sampling

    assert furthest_point_sampling(cloud[None], 60)[0][0].tolist() != by_threads(cloud, 60)[0]


@pytest.mark.parametrize(("count", "samples"), [(1, 1), (30, 12), (130, 50)])
def test_furthest_points_by_distance(count, samples):
    points = clouds(count)
    distances = (points.unsqueeze(1) - points.unsqueeze(2)).square().sum(3)
    found = furthest_point_sample_with_dist(distances, samples)
    assert found.dtype == torch.int32
    for cloud, rows in zip(distances, found, strict=True):
        assert rows.tolist() == by_threads(cloud, samples, True)[0]


def test_far_points_are_alike_beyond_what_mmcv_begins_with():
    points = torch.tensor([[[0.0, 0, 0], [2e5, 0, 0], [9e5, 0, 0], [3e5, 0, 0]]])
    temp, found = torch.full((1, 4), 1e10), torch.empty(1, 3, dtype=torch.int32)
    ext.furthest_point_sampling_forward(points, temp, found, b=1, n=4, m=3)
    assert found[0].tolist() == by_threads(points[0], 3)[0]


def test_gather():
    feats = torch.randn(2, 5, 9, requires_grad=True)
    index = torch.randint(9, (2, 6), dtype=torch.int32)
    out = gather_points(feats, index)
    exact = feats.detach().double().requires_grad_()
    wanted = exact.gather(2, index.long().unsqueeze(1).expand(-1, 5, -1))
    assert torch.equal(out.double(), wanted)
    grad = torch.randn(out.shape)
    right, found = torch.autograd.grad(wanted, exact, grad.double()), torch.autograd.grad(out, feats, grad)
    assert_close("grad", right[0], found[0], 1e-6)


def test_gather_nothing():
    feats = torch.randn(2, 5, 0, requires_grad=True)
    out = gather_points(feats, torch.zeros(2, 0, dtype=torch.int32))
    assert out.shape == (2, 5, 0)
    assert torch.autograd.grad(out.sum(), feats)[0].shape == (2, 5, 0)
