"""Furthest point sampling: every backend equals a loop that knows no shortcut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.points import furthest_point_sampling, furthest_point_sampling_with_distances
from kernelgraft_core.points.sampling.ops import SAMPLE


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def loop(points, samples, nearest=None):
    """Of one cloud, in the arithmetic of its type."""
    nearest = points.new_full((len(points),), torch.inf) if nearest is None else nearest.clone()
    chosen = [0]
    for _ in range(1, samples):
        dx, dy, dz = (points - points[chosen[-1]]).unbind(1)
        nearest = torch.fmin(nearest, dx * dx + dy * dy + dz * dz)
        chosen.append(int((nearest == nearest.max()).nonzero()[0]))
    return chosen[:samples], nearest


def clouds(kind, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "lattice":  # most distances are those of many pairs
        return torch.randint(0, 4, (3, count, 3), generator=generator).float()
    if kind == "copies":
        return torch.randn(3, 5, 3, generator=generator)[:, torch.arange(count) % 5]
    if kind == "line":
        return torch.rand(3, count, 1, generator=generator) * torch.tensor([1.0, 0, 0])
    return torch.randn(3, count, 3, generator=generator) * torch.tensor([70.0, 40.0, 2.0])


@pytest.mark.parametrize("kind", ["lattice", "copies", "line", "scan"])
@pytest.mark.parametrize(("count", "samples"), [(1, 1), (1, 4), (64, 64), (65, 9), (700, 300), (5, 0)], ids=str)
def test_is_a_loop(kind, count, samples, backend):
    points = clouds(kind, count)
    found, nearest = furthest_point_sampling(points, samples)
    assert found.dtype == torch.int32
    for cloud, rows, away in zip(points, found, nearest, strict=True):
        wanted, distances = loop(cloud, samples)
        assert rows.tolist() == wanted
        assert torch.equal(away, distances)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype):
    points = clouds("scan", 200).to(dtype)
    wide = points if dtype == torch.float64 else points.float()
    found, nearest = furthest_point_sampling(points, 50)
    assert nearest.dtype == wide.dtype
    assert [rows.tolist() for rows in found] == [loop(cloud, 50)[0] for cloud in wide]


def test_what_was_chosen_before_counts(backend):
    points = clouds("scan", 300)
    far = torch.rand(3, 300) * 500
    before = far.clone()
    found, nearest = furthest_point_sampling(points, 80, far)
    assert torch.equal(far, before)
    for cloud, rows, away, start in zip(points, found, nearest, far, strict=True):
        wanted, distances = loop(cloud, 80, start)
        assert rows.tolist() == wanted
        assert torch.equal(away, distances)
    first, middle = furthest_point_sampling(points, 40)
    assert torch.equal(first, furthest_point_sampling(points, 80)[0][:, :40])
    assert (furthest_point_sampling(points, 80)[1] <= middle).all()


@pytest.mark.parametrize(("count", "samples"), [(1, 3), (90, 40), (7, 0)], ids=str)
def test_distances_that_are_known(count, samples, backend):
    points = clouds("lattice", count)
    dx, dy, dz = (points.unsqueeze(1) - points.unsqueeze(2)).unbind(3)
    by_distance = furthest_point_sampling_with_distances(dx * dx + dy * dy + dz * dz, samples)
    by_place = furthest_point_sampling(points, samples)
    assert torch.equal(by_distance[0], by_place[0])
    assert torch.equal(by_distance[1], by_place[1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200), st.integers(0, 60), st.sampled_from(["lattice", "copies", "line", "scan"]), st.integers(0, 99)
)
def test_any_cloud(count, samples, kind, seed):
    pytest.importorskip("numba")
    points = clouds(kind, count, seed)
    assert [r.tolist() for r in furthest_point_sampling(points, samples)[0]] == [loop(c, samples)[0] for c in points]


def test_points_that_are_no_places_break_nothing(backend):
    points = clouds("scan", 200)
    for odd in (float("nan"), float("inf"), -float("inf"), 3e38):
        for rows in ([0], [5, 70, 199], list(range(200))):
            broken = points.clone()
            broken[:, rows, 1] = odd
            found, _ = furthest_point_sampling(broken, 50)
            assert found.min() >= 0
            assert found.max() < 200


def test_no_clouds_and_no_samples(backend):
    assert furthest_point_sampling(torch.zeros(0, 5, 3), 4)[0].shape == (0, 4)
    assert furthest_point_sampling(torch.zeros(2, 0, 3), 0)[0].shape == (2, 0)


def test_transposed_points(backend):
    points = clouds("scan", 100)
    turned = points.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(furthest_point_sampling(turned, 20)[0], furthest_point_sampling(points, 20)[0])


def test_threads_do_not_change_the_result():
    pytest.importorskip("numba")
    points, found = clouds("scan", 3000), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(furthest_point_sampling(points, 200)[0])
    assert torch.equal(*found)


def test_it_is_a_sound_op(backend):
    torch.library.opcheck(SAMPLE._overload, (torch.rand(2, 30, 3), torch.full((2, 30), 9.0), 5, False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: furthest_point_sampling(torch.zeros(5, 3), 2), r"points is torch\.float32 \(5, 3\)"),
        (lambda: furthest_point_sampling(torch.zeros(1, 5, 3).int(), 2), r"points is torch\.int32"),
        (lambda: furthest_point_sampling(torch.zeros(1, 0, 3), 2), "cannot take 2 samples of 0 points"),
        (lambda: furthest_point_sampling(torch.zeros(1, 5, 3), -1), "cannot take -1 samples"),
        (lambda: furthest_point_sampling(torch.zeros(1, 5, 3), 1, torch.zeros(1, 4)), r"nearest is .* \(1, 4\)"),
        (lambda: furthest_point_sampling_with_distances(torch.zeros(1, 5, 4), 1), r"distances is .* \(1, 5, 4\)"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
