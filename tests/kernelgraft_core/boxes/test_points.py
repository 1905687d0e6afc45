"""Points in boxes and polygons: every backend against geometry in float64, and what lies on a side."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.boxes import first_box_of_points, points_in_boxes, points_in_polygons
from kernelgraft_core.boxes.points import ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=["fp64", "fp32", "fp16", "bf16"]
)


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def a_scene(batches=2, points=300, boxes=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(batches, boxes, 7, generator=generator, dtype=torch.float64)
    found = found * torch.tensor([4, 4, 1, 4, 3, 2, 20.0]) - torch.tensor([0, 0, 1, 0, 0, 0, 10.0])
    cloud = torch.rand(batches, points, 3, generator=generator, dtype=torch.float64) * torch.tensor(
        [4, 4, 2]
    ) - torch.tensor([0, 0, 1])
    return cloud.to(dtype), found.to(dtype)


def by_definition(points, boxes):
    """Membership, and how near the nearest side is."""
    inside, nearest = [], []
    for batch_points, batch_boxes in zip(points.double().tolist(), boxes.double().tolist(), strict=True):
        for x, y, z in batch_points:
            for cx, cy, cz, dx, dy, dz, heading in batch_boxes:
                along = (x - cx) * math.cos(heading) + (y - cy) * math.sin(heading)
                across = (y - cy) * math.cos(heading) - (x - cx) * math.sin(heading)
                gaps = dx / 2 - abs(along), dy / 2 - abs(across), dz / 2 - abs(z - cz - dz / 2)
                inside.append(gaps[0] > 0 and gaps[1] > 0 and gaps[2] >= 0)
                nearest.append(min(abs(gap) for gap in gaps))
    shape = (*points.shape[:2], boxes.shape[1])
    return torch.tensor(inside).view(shape), torch.tensor(nearest).view(shape)


@DTYPES
def test_they_lie_where_geometry_says(dtype, backend):
    points, boxes = a_scene(dtype=dtype)
    found, (wanted, nearest) = points_in_boxes(points, boxes), by_definition(points, boxes)
    clear = nearest > (1e-12 if dtype == torch.float64 else 1e-5)
    assert clear.float().mean() > 0.99
    assert 0.02 < wanted.float().mean() < 0.9
    assert torch.equal(found[clear], wanted[clear])
    inside, first = found.max(2)
    assert torch.equal(first_box_of_points(points, boxes), torch.where(inside, first, -1).int())


def test_sides_are_outside_and_ends_inside(backend):
    box = torch.tensor([[[1.0, 2, -1, 4, 2, 3, 0]]])
    on_sides = torch.tensor([[3.0, 2, 0], [-1, 2, 0], [1, 3, 0], [1, 1, 0], [3, 3, 0]])
    on_ends = torch.tensor([[1.0, 2, -1], [1, 2, 2]])
    beyond = torch.tensor([[1, 2, -1.0001], [1, 2, 2.0001], [math.nan, 2, 0], [1, math.nan, 0], [1, 2, math.nan]])
    assert not points_in_boxes(on_sides[None], box).any()
    assert points_in_boxes(on_ends[None], box).all()
    assert first_box_of_points(beyond[None], box).eq(-1).all()
    for odd in ([1.0, 2, -1, 0, 2, 3, 0], [1, 2, -1, -4, 2, 3, 0], [1, 2, -1, 4, 2, 3, math.nan]):
        assert not points_in_boxes(torch.tensor([[[1.0, 2, 0]]]), torch.tensor([[odd]]).float()).any()


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (1, 1, 1)], ids=str)
def test_few_or_none(sizes, backend):
    points, boxes = a_scene(*sizes)
    assert points_in_boxes(points, boxes).shape == sizes
    first = first_box_of_points(points, boxes)
    assert first.shape == sizes[:2]
    assert first.dtype == torch.int32
    if not sizes[2]:
        assert first.eq(-1).all()
    assert points_in_polygons(torch.rand(sizes[1], 2), torch.rand(sizes[2], 8)).shape == sizes[1:]


def test_points_in_any_memory(backend):
    points, boxes = a_scene()
    wanted = points_in_boxes(points, boxes)
    assert torch.equal(points_in_boxes(points.mT.contiguous().mT, boxes.mT.contiguous().mT), wanted)
    flat = points[0, :, :2], torch.rand(5, 8).double() * 5
    assert torch.equal(points_in_polygons(flat[0], flat[1].T.contiguous().T), points_in_polygons(*flat))


def test_many_points_are_taken_in_parts(monkeypatch):
    points, boxes = a_scene()
    wanted = points_in_boxes(points, boxes), first_box_of_points(points, boxes)
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    monkeypatch.setattr(ops.reference, "CHUNK", 100)
    found = points_in_boxes(points, boxes), first_box_of_points(points, boxes)
    assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))


def test_threads_do_not_change_the_result(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("kernelgraft_core.boxes.points.cpu.PAIRS", 64)
    points, boxes = a_scene()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((points_in_boxes(points, boxes), first_box_of_points(points, boxes)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@DTYPES
def test_polygons(dtype, backend):
    """Convex ones: inside means on the same side of all edges."""
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(12, 4, generator=generator) * 2 * math.pi).sort(1)[0]
    corners = 2 * torch.stack((angles.cos(), angles.sin()), 2) + torch.rand(12, 1, 2, generator=generator)
    polygons = corners.flatten(1).to(dtype)
    points = (torch.rand(200, 2, generator=generator) * 6 - 3).to(dtype)
    corners = polygons.double().view(12, 4, 2)
    edges = corners.roll(-1, 1) - corners
    away = points.double().view(-1, 1, 1, 2) - corners
    sides = edges[..., 0] * away[..., 1] - edges[..., 1] * away[..., 0]
    wanted, clear = (sides > 0).all(2), (sides.abs() > 1e-4).all(2)
    found = points_in_polygons(points, polygons)
    assert wanted.float().mean() > 0.05
    assert torch.equal(found[clear], wanted[clear])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_backends_agree_on_edges(seed):
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 4, (30, 2), generator=generator).float()
    polygons = torch.randint(0, 4, (10, 8), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for backend in ("cpu", "reference"):
            patch.setenv("KERNELGRAFT_BACKEND", backend)
            found.append(points_in_polygons(points, polygons))
    assert torch.equal(*found)


def test_they_are_sound_ops():
    points, frames = ops._prepared(*a_scene(points=5))
    torch.library.opcheck(ops.ALL._overload, (points, frames))
    torch.library.opcheck(ops.FIRST._overload, (points, frames))
    torch.library.opcheck(ops.POLYGONS._overload, (torch.rand(4, 2), torch.rand(3, 8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: points_in_boxes(torch.zeros(1, 2, 4), torch.zeros(1, 2, 7)), r"points is torch\.float32 \(1, 2, 4\)"),
        (lambda: points_in_boxes(torch.zeros(1, 2, 3), torch.zeros(2, 2, 7)), r"boxes is .* \(2, 2, 7\), .*\(1,"),
        (lambda: points_in_boxes(torch.zeros(1, 2, 3), torch.zeros(1, 2, 7).double()), r"boxes is torch\.float64 on"),
        (lambda: first_box_of_points(torch.zeros(1, 2, 3).int(), torch.zeros(1, 2, 7)), r"points is torch\.int32"),
        (lambda: points_in_polygons(torch.zeros(2, 2), torch.zeros(2, 6)), r"polygons is torch\.float32 \(2, 6\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
