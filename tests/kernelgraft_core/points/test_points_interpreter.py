"""The Triton kernels of point clouds in the interpreter, on CPU tensors, against the references."""

import os

import pytest
import torch

from kernelgraft_core.points.neighbors import reference as neighbors_reference
from kernelgraft_core.points.reduce import reference as reduce_reference
from kernelgraft_core.points.reduce.ops import voxel_groups
from kernelgraft_core.points.sampling import reference as sampling_reference
from kernelgraft_core.runtime.testing import assert_close, poison_empty

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.points.neighbors import triton as neighbors
    from kernelgraft_core.points.reduce import triton as reduction
    from kernelgraft_core.points.sampling import triton as sampling
else:
    neighbors = reduction = sampling = None


def lattice(*shape, most=5):
    return torch.randint(0, most, (*shape, 3)).float() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("channels", [1, 5, 70])
def test_reduction_is_that_of_the_reference(channels, reduce, dtype):
    groups = voxel_groups(torch.randint(-1, 3, (60, 2)))
    feats = (torch.randint(-9, 9, (60, channels)) / 4).to(dtype)
    feats[[3, 7], 0] = float("nan") if reduce == "max" else 0
    starts = torch.cat((groups.starts, groups.starts[-1:]))  # and a group without members
    with poison_empty():
        out, source = reduction.points_reduce(feats, groups.order, starts, reduce)
    wanted, rows = reduce_reference.points_reduce(feats, groups.order, starts, reduce)
    assert_close("y", wanted, out, 0 if reduce == "max" else 1e-3)
    assert torch.equal(source, rows)


def test_what_is_no_maximum():
    nan, inf = float("nan"), float("inf")
    feats = torch.tensor([[nan, nan, -inf, 1.0], [2.0, nan, nan, inf], [2.0, nan, -inf, inf]])
    out, source = reduction.points_reduce(feats, torch.arange(3), torch.tensor([0, 3]), "max")
    assert out.tolist() == [[2.0, -inf, -inf, inf]]
    assert source.tolist() == [[1, -1, 0, 1]]


@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize(("count", "samples"), [(1, 3), (45, 20), (130, 12)])
def test_sampling_is_that_of_the_reference(count, samples, in_registers, monkeypatch):
    if not in_registers:
        monkeypatch.setattr(sampling, "IN_REGISTERS", 0)
        monkeypatch.setattr(sampling, "TILE", 32)
    points, nearest = lattice(2, count), torch.full((2, count), 5.0)
    dx, dy, dz = (points.unsqueeze(1) - points.unsqueeze(2)).unbind(3)
    for values, distances in ((points, False), (dx * dx + dy * dy + dz * dz, True)):
        with poison_empty():
            found = sampling.furthest_points(values, nearest, samples, distances)
        for right, each in zip(
            sampling_reference.furthest_points(values, nearest, samples, distances), found, strict=True
        ):
            assert torch.equal(each, right)


@pytest.mark.parametrize("tile", [32, 512])
@pytest.mark.parametrize("neighbors_of_each", [1, 3, 8, 13])
def test_the_nearest_are_those_of_the_reference(neighbors_of_each, tile, monkeypatch):
    monkeypatch.setattr(neighbors, "TILE", tile)
    points, centers = lattice(75), lattice(9)
    points[4, 1], points[60, 0], centers[2, 2] = float("nan"), float("inf"), float("nan")
    flat = points, centers, torch.tensor([0, 70, 70, 75]), torch.tensor([0, 5, 6, 9])
    with poison_empty():
        rows, away = neighbors.points_knn(*flat, neighbors_of_each)
    right_rows, right_away = neighbors_reference.points_knn(*flat, neighbors_of_each)
    assert torch.equal(rows, right_rows)
    assert torch.equal(away, right_away)


@pytest.mark.parametrize("tile", [32, 512])
@pytest.mark.parametrize("how", [(0.0, 0.3, 4), (0.25, 1.0, 40), (0.0, 100.0, 7)], ids=str)
def test_what_is_within_is_that_of_the_reference(how, tile, monkeypatch):
    monkeypatch.setattr(neighbors, "TILE", tile)
    points, centers = lattice(75), lattice(9)
    points[4, 1], points[60, 0], centers[2, 2] = float("nan"), float("inf"), float("nan")
    flat = points, centers, torch.tensor([0, 70, 70, 75]), torch.tensor([0, 5, 6, 9])
    with poison_empty():
        rows = neighbors.points_in_ball(*flat, *how)
    assert torch.equal(rows, neighbors_reference.points_in_ball(*flat, *how))


def test_nothing():
    none, starts = torch.zeros(0, 3), torch.tensor([0, 0])
    assert neighbors.points_knn(none, none, starts, starts, 2)[0].shape == (0, 2)
    assert neighbors.points_in_ball(none, none, starts, starts, 0.0, 1.0, 2).shape == (0, 2)
    alone = neighbors.points_knn(none, lattice(2), starts, torch.tensor([0, 2]), 2)
    assert alone[0].eq(-1).all()
    assert alone[1].isinf().all()
    assert reduction.points_reduce(none, starts[:0], starts[:1], "max")[0].shape == (0, 3)
    assert sampling.furthest_points(torch.zeros(0, 5, 3), torch.zeros(0, 5), 3, False)[0].shape == (0, 3)
