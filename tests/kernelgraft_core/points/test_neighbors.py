"""Neighbours: every backend equals sorting, or filtering, all points."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.points import ball_query, knn, three_nn
from kernelgraft_core.points.neighbors.ops import BALL, KNN


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def squares(points, center):
    dx, dy, dz = (center - points).unbind(1)
    return dx * dx + dy * dy + dz * dz


def sorted_points(points, center, neighbors):
    away = squares(points, center).tolist()
    near = sorted((d, i) for i, d in enumerate(away) if d < float("inf"))[:neighbors]
    missing = neighbors - len(near)
    return [i for _, i in near] + [-1] * missing, [d for d, _ in near] + [float("inf")] * missing


def filtered_points(points, center, max_radius, samples, min_radius=0.0):
    low, high = (float(np.float32(r) * np.float32(r)) for r in (min_radius, max_radius))
    found = [i for i, d in enumerate(squares(points, center).tolist()) if d == 0 or low <= d < high][:samples]
    return (found + found[:1] * samples)[:samples] if found else [-1] * samples


def cloud(kind, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "lattice":
        return torch.randint(0, 5, (count, 3), generator=generator) / 2
    if kind == "copies":
        return torch.randn(3, 3, generator=generator)[torch.arange(count) % 3]
    return torch.randn(count, 3, generator=generator) * torch.tensor([5.0, 3.0, 0.5])


def check_knn(points, centers, neighbors):
    rows, away = knn(points, centers, neighbors)
    assert rows.dtype == torch.int32
    for b in range(len(points)):
        for m in range(centers.shape[1]):
            right_rows, right_away = sorted_points(points[b], centers[b, m], neighbors)
            assert rows[b, m].tolist() == right_rows
            assert away[b, m].tolist() == right_away


def check_ball(points, centers, *how):
    rows = ball_query(points, centers, *how)
    assert rows.dtype == torch.int32
    for b in range(len(points)):
        for m in range(centers.shape[1]):
            assert rows[b, m].tolist() == filtered_points(points[b], centers[b, m], *how)


KINDS = pytest.mark.parametrize("kind", ["lattice", "copies", "scan"])


@KINDS
@pytest.mark.parametrize("neighbors", [1, 3, 16, 90])
@pytest.mark.parametrize("count", [1, 64, 65, 700])
def test_the_nearest_are_the_first_of_all_sorted(count, neighbors, kind, backend):
    points = torch.stack([cloud(kind, count, seed) for seed in range(2)])
    centers = torch.stack([cloud(kind, 11, seed) for seed in (0, 5)])
    check_knn(points, centers, neighbors)


@KINDS
@pytest.mark.parametrize(
    "how", [(0.5, 4), (1.0, 20, 0.5), (2.0, 5, 0.0), (100.0, 3), (100.0, 900), (1e-30, 2)], ids=str
)
@pytest.mark.parametrize("count", [1, 64, 65, 700])
def test_a_ball_has_the_first_of_all_that_are_within(count, how, kind, backend):
    points = torch.stack([cloud(kind, count, seed) for seed in range(2)])
    centers = torch.stack([cloud(kind, 11, seed) for seed in (0, 5)])
    check_ball(points, centers, *how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype):
    points, centers = cloud("scan", 200)[None].to(dtype), cloud("scan", 9, 3)[None].to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, away = knn(points, centers, 4)
    assert away.dtype == wide
    assert torch.equal(rows, knn(points.to(wide), centers.to(wide), 4)[0])
    wanted = [filtered_points(points[0].to(wide), center.to(wide), 1.5, 6) for center in centers[0]]
    assert ball_query(points, centers, 1.5, 6)[0].tolist() == wanted


def test_three_nearest_are_knn(backend):
    sources, targets = cloud("scan", 50)[None], cloud("scan", 20, 1)[None]
    rows, away = knn(sources, targets, 3)
    found_away, found_rows = three_nn(targets, sources)
    assert torch.equal(found_rows, rows)
    assert torch.equal(found_away, away)


@pytest.mark.parametrize(("points", "centers"), [([5, 0, 70, 3], [2, 4, 0, 7]), ([0, 6], [3, 0]), ([], [])], ids=str)
def test_clouds_one_after_another(points, centers, backend):
    clouds = [cloud("lattice", count, i) for i, count in enumerate(points)]
    queries = [cloud("lattice", count, 9 + i) for i, count in enumerate(centers)]
    counts = torch.tensor(points, dtype=torch.int32), torch.tensor(centers, dtype=torch.int32)
    flat = torch.cat([torch.empty(0, 3), *clouds]), torch.cat([torch.empty(0, 3), *queries])
    nearest = [sorted_points(p, c, 4) for p, q in zip(clouds, queries, strict=True) for c in q]
    rows, away = knn(*flat, 4, *counts)
    assert rows.tolist() == [each[0] for each in nearest]
    assert away.tolist() == [each[1] for each in nearest]
    within = [filtered_points(p, c, 1.0, 5) for p, q in zip(clouds, queries, strict=True) for c in q]
    assert ball_query(*flat, 1.0, 5, 0.0, *counts).tolist() == within


def test_what_is_no_place_is_near_nothing(backend):
    points, centers = cloud("scan", 300), cloud("scan", 6, 1)
    for row, odd in ((3, float("nan")), (70, float("inf")), (71, -float("inf")), (150, 3e38), (299, float("nan"))):
        points[row, row % 3] = odd
    centers[1, 0], centers[2, 1], centers[3, 2] = float("nan"), float("inf"), 3e38
    check_knn(points[None], centers[None], 5)
    check_ball(points[None], centers[None], 2.0, 5)
    check_ball(points[None], centers[None], 90.0, 500)
    check_knn(torch.full((1, 70, 3), float("nan")), centers[None], 2)


@pytest.mark.parametrize(("count", "centers"), [(0, 3), (5, 0), (0, 0)])
def test_no_points_or_centers(count, centers, backend):
    check_knn(torch.zeros(2, count, 3), torch.zeros(2, centers, 3), 2)
    check_ball(torch.zeros(2, count, 3), torch.zeros(2, centers, 3), 1.0, 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cloud(data):
    pytest.importorskip("numba")
    kind, seed = data.draw(st.sampled_from(["lattice", "copies", "scan"])), data.draw(st.integers(0, 99))
    points = cloud(kind, data.draw(st.integers(1, 200)), seed)[None]
    centers = cloud(kind, data.draw(st.integers(1, 5)), seed + data.draw(st.integers(0, 1)))[None]
    check_knn(points, centers, data.draw(st.integers(1, 20)))
    low = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    check_ball(points, centers, low + data.draw(st.sampled_from([0.2, 1.0, 9.0])), data.draw(st.integers(1, 30)), low)


def test_threads_do_not_change_the_result():
    pytest.importorskip("numba")
    points, found = cloud("scan", 3000)[None], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((*knn(points, points, 5), ball_query(points, points, 0.5, 9)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_they_are_sound_ops(backend):
    flat = torch.rand(30, 3), torch.rand(8, 3), torch.tensor([0, 10, 30]), torch.tensor([0, 8, 8])
    torch.library.opcheck(KNN._overload, (*flat, 4))
    torch.library.opcheck(BALL._overload, (*flat, 0.0, 0.25, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(4, 3)}, r"points is torch\.float32 \(4, 3\), expected floating point \(B, N, 3\)"),
        ({"points": torch.zeros(1, 4, 2)}, r"points is torch\.float32 \(1, 4, 2\)"),
        ({"points": torch.zeros(2, 4, 3)}, r"points is \(2, 4, 3\) and centers \(1, 2, 3\): clouds differ"),
        ({"centers": torch.zeros(1, 2, 3).double()}, r"centers is torch\.float64 on cpu, points torch\.float32"),
        ({"neighbors": 0}, "neighbors is 0"),
        ({"center_counts": torch.tensor([2])}, "belong together"),
        ({"point_counts": torch.tensor([2])}, r"expected floating point \(N, 3\)"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {"points": torch.zeros(1, 4, 3), "centers": torch.zeros(1, 2, 3), "neighbors": 2}
    with pytest.raises(ValueError, match=message):
        knn(**right | change)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (([1, 2], [2, 0]), r"point_counts is \[1, 2\], expected none below 0 and a sum of 4"),
        (([5, -1], [2, 0]), r"point_counts is \[5, -1\]"),
        (([1, 3], [2]), r"center_counts is torch\.int64 \(1,\)"),
        (([1.0, 3.0], [2, 0]), r"point_counts is torch\.float32"),
    ],
)
def test_counts_that_are_wrong_are_named(counts, message):
    with pytest.raises(ValueError, match=message):
        knn(torch.zeros(4, 3), torch.zeros(2, 3), 1, *map(torch.tensor, counts))


@pytest.mark.parametrize(
    "how", [(0.0, 3), (1.0, 0), (1.0, 3, 1.0), (1.0, 3, -0.5), (float("nan"), 3), (float("inf"), 3)]
)
def test_balls_that_are_none_are_refused(how):
    with pytest.raises(ValueError, match=f"samples is {how[1]}, min_radius"):
        ball_query(torch.zeros(1, 4, 3), torch.zeros(1, 2, 3), *how)
