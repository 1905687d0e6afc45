"""Voxelization: every backend equals a loop over the points, to the last bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.points import dynamic_voxelize, hard_voxelize, hard_voxelize_into
from kernelgraft_core.points.voxelize.grid import grid_of
from kernelgraft_core.points.voxelize.ops import DYNAMIC, HARD

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BACKENDS = ["cpu", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


def force(name, monkeypatch):
    if name == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", name)


def voxel_of(point, size, low, grid):
    """One point, one axis after another, in the arithmetic of its type; None outside."""
    found = []
    for x, s, lower, count in zip(point, size, low, grid, strict=False):
        with np.errstate(all="ignore"):
            cell = np.floor((x - x.dtype.type(lower)) / x.dtype.type(s))
        if not (np.isfinite(cell) and 0 <= cell < count):
            return None
        found.insert(0, int(cell))
    return tuple(found)


def loop(points, voxel_size, point_range, max_points, max_voxels):
    grid = grid_of(voxel_size, point_range)
    size = grid.size
    wide = points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
    cells = [voxel_of(point, size, grid.low, grid.shape) for point in wide.numpy()]
    rows = {}
    for i, cell in enumerate(cells):
        if cell is not None and (cell in rows or len(rows) < max_voxels):
            rows.setdefault(cell, []).append(i)
    voxels = points.new_zeros((len(rows), max_points, points.shape[1]))
    for place, members in zip(voxels, rows.values(), strict=True):
        kept = members[:max_points]
        place[: len(kept)] = points[kept]
    coordinates = torch.tensor(list(rows), dtype=torch.int32).view(len(rows), len(size))
    counts = torch.tensor([min(len(m), max_points) for m in rows.values()], dtype=torch.int32)
    none = (-1,) * len(size)
    dynamic = torch.tensor([none if c is None else c for c in cells], dtype=torch.int32).view(-1, len(size))
    return dynamic, (voxels, coordinates, counts)


def check(points, voxel_size, point_range, max_points, max_voxels):
    dynamic, hard = loop(points, voxel_size, point_range, max_points, max_voxels)
    assert torch.equal(dynamic_voxelize(points, voxel_size, point_range), dynamic)
    found = hard_voxelize(points, voxel_size, point_range, max_points, max_voxels)
    for wanted, each in zip(hard, found, strict=True):
        assert each.dtype == wanted.dtype
        assert torch.equal(each.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("max_points", "max_voxels"), [(1, 1000), (3, 20), (35, 7), (4, 0)], ids=str)
def test_is_a_loop_over_the_points(dtype, max_points, max_voxels, backend, request):
    if backend == "cpu" and dtype != torch.float32:
        pytest.skip("the reference's")
    points = (torch.randn(700, 5) * 2).to(dtype)
    check(points, (0.3, 0.4, 1.1), (-3, -2, -1.5, 2.7, 3.1, 1.9), max_points, max_voxels)


@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_other_dimensions(dimensions, backend):
    check(torch.rand(200, dimensions + 1), (0.17,) * dimensions, (0.1,) * dimensions + (0.9,) * dimensions, 3, 50)


def test_points_between_voxels_fall_where_floats_say(backend):
    """Multiples of a size that no float is: what is on either side of a bound is decided by rounding alone."""
    x = torch.arange(-60, 60) * 0.05
    points = torch.stack(torch.meshgrid(x, x[:7], x[:3], indexing="ij"), 3).view(-1, 3)
    check(points, (0.05, 0.05, 0.1), (-3, -3, -3, 3, 3, 1), 5, 10_000)


def test_a_last_voxel_counts_where_half_of_it_is_inside(backend):
    for high, voxels in ((10.4, 10), (10.5, 11), (10.6, 11)):
        points = torch.tensor([[9.9, 0.5], [10.2, 0.5], [10.99, 0.5], [11.0, 0.5]])
        found = dynamic_voxelize(points, (1.0, 1.0), (0, 0, high, 1))
        assert found[:, 1].tolist() == ([9, -1, -1, -1] if voxels == 10 else [9, 10, 10, -1])


def test_what_is_no_place_has_no_voxel(backend):
    odd = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, -1e-30, 0.5]
    points = torch.tensor([(*p, 7.0) for p in itertools.product(odd, repeat=3)])
    check(points, (0.1, 0.2, 0.3), (0, 0, 0, 1, 1, 1), 4, 100)
    check(points, (1e35, 1e35, 1e35), (0, 0, 0, 3e38, 3e38, 3e38), 4, 100)


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(count, backend):
    check(torch.full((count, 4), 0.5), (0.1, 0.1, 0.1), (0, 0, 0, 1, 1, 1), 3, 10)
    check(torch.full((count, 4), 5.0), (0.1, 0.1, 0.1), (0, 0, 0, 1, 1, 1), 3, 10)
    check(torch.full((count, 4), 0.5), (1.0, 1.0, 1.0), (0, 0, 0, 0, 0, 0), 3, 10)


def test_columns_of_another_tensor(backend):
    whole = torch.rand(300, 7)
    assert not whole[:, 1:5].is_contiguous()
    check(whole[:, 1:5], (0.2, 0.2, 0.5), (0, 0, 0, 1, 1, 1), 3, 30)


def test_memory_that_is_there_is_written_and_no_more(backend):
    points = torch.rand(100, 3)
    voxels, coordinates = torch.zeros(50, 4, 3), torch.full((50, 3), 9, dtype=torch.int32)
    counts = torch.full((50,), 8, dtype=torch.int32)
    number = int(hard_voxelize_into(points, (0.5,) * 3, (0, 0, 0, 1, 1, 1), voxels, coordinates, counts))
    wanted = hard_voxelize(points, (0.5,) * 3, (0, 0, 0, 1, 1, 1), 4, 50)
    assert number == 8
    for found, each in zip((voxels, coordinates, counts), wanted, strict=True):
        assert torch.equal(found[:number], each)
    assert voxels[number:].eq(0).all()
    assert coordinates[number:].eq(9).all()
    assert counts[number:].eq(0).all()


def test_outputs_that_are_not_contiguous():
    points, wide = torch.rand(100, 3), torch.zeros(50, 9, 3)
    coordinates, counts = torch.zeros(50, 3, dtype=torch.int32), torch.zeros(50, dtype=torch.int32)
    hard_voxelize_into(points, (0.5,) * 3, (0, 0, 0, 1, 1, 1), wide[:, :4], coordinates, counts)
    assert torch.equal(wide[:8, :4], hard_voxelize(points, (0.5,) * 3, (0, 0, 0, 1, 1, 1), 4, 50)[0])
    assert wide[:, 4:].eq(0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cloud(data):
    pytest.importorskip("numba")
    count, channels = data.draw(st.integers(0, 80)), data.draw(st.integers(3, 6))
    points = torch.randn(count, channels, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    size = data.draw(st.tuples(*[st.sampled_from([0.1, 0.25, 1.0, 5.0])] * 3))
    check(points, size, (-1, -1, -2, 1, 1.3, 2), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 40)))


def test_a_grid_that_is_larger_than_memory(backend):
    points = torch.rand(500, 3) * 1000
    check(points, (1e-3, 1e-3, 1e-3), (0, 0, 0, 1000, 1000, 1000), 2, 400)


def test_keys_that_meet_in_the_table():
    """Many voxels and few places for them: some must be looked for further on."""
    pytest.importorskip("numba")
    points = torch.cartesian_prod(*[torch.arange(16) + 0.5] * 3)[torch.randperm(4096)]
    check(points, (1, 1, 1), (0, 0, 0, 16, 16, 16), 1, 4096)
    check(points, (1, 1, 1), (0, 0, 0, 16, 16, 16), 1, 3)


def test_threads_do_not_change_the_result():
    pytest.importorskip("numba")
    points, found = torch.randn(30_000, 4), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(hard_voxelize(points, (0.1, 0.1, 0.1), (-2, -2, -2, 2, 2, 2), 5, 9000))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_they_are_sound_ops(backend):
    points, grid = torch.rand(40, 4), ([0.2] * 3, [0.0] * 3 + [1.0] * 3)
    torch.library.opcheck(DYNAMIC._overload, (points, *grid))
    outputs = (
        torch.zeros(20, 2, 4), torch.zeros(20, 3, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    )  # fmt: skip
    torch.library.opcheck(HARD._overload, (points, *grid, *outputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(3, 2)}, r"points is torch\.float32 \(3, 2\), expected floating point \(N, C\), C at"),
        ({"points": torch.zeros(3, 3).int()}, r"points is torch\.int32"),
        ({"voxel_size": (0, 1, 1)}, r"voxel_size is \(0\.0, 1\.0, 1\.0\)"),
        ({"voxel_size": (1, 1)}, "voxel_size has 2 numbers and point_range 6"),
        ({"point_range": (0, 0, 0, -1, 1, 1)}, r"point_range \(0\.0, .* low <= high"),
        ({"point_range": (0, 0, 0, float("nan"), 1, 1)}, "finite"),
        ({"point_range": (-3e38, 0, 0, 3e38, 1, 1)}, r"a grid of \[inf, 1"),
        ({"voxel_size": (1e-20, 1, 1)}, "at most 2\\^31 - 1 of an axis"),
        ({"voxel_size": (1e-9, 1e-9, 1e-9)}, "more than 2\\^62"),
        ({"max_points": 0}, "max_points is 0"),
        ({"max_voxels": -1}, "max_voxels -1"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {"points": torch.zeros(3, 4), "voxel_size": (1, 1, 1), "point_range": (0, 0, 0, 1, 1, 1),
             "max_points": 2, "max_voxels": 3}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        hard_voxelize(**right | change)


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(5, 4, 2), r"voxels is torch\.float32 \(5, 4, 2\), expected torch\.float32 \(M, P, 3\)"),
        (0, torch.zeros(5, 4, 3).double(), r"voxels is torch\.float64"),
        (1, torch.zeros(5, 2).int(), r"coordinates is torch\.int32 \(5, 2\), expected torch\.int32 \(5, 3\)"),
        (2, torch.zeros(5), r"counts is torch\.float32 \(5,\)"),
    ],
)
def test_outputs_that_do_not_fit_are_named(place, tensor, message):
    outputs = [torch.zeros(5, 4, 3), torch.zeros(5, 3).int(), torch.zeros(5).int()]
    outputs[place] = tensor
    with pytest.raises(ValueError, match=message):
        hard_voxelize_into(torch.zeros(3, 3), (1, 1, 1), (0, 0, 0, 1, 1, 1), *outputs)
