"""Pooling of points in boxes: every backend equals a loop over boxes and points."""

import math

import pytest
import torch

from kernelgraft_core.points import roi_aware_pool, roi_point_pool
from kernelgraft_core.points.roi_pool.ops import AWARE, GRADIENT, INSIDE, roi_aware_pool_into
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, 3, generator=generator)
    size = torch.rand(count, 3, generator=generator) * 3 + 0.5
    return torch.cat((centre, size, torch.rand(count, 1, generator=generator) * 9 - 4), 1)


def local(point, roi):
    """Where a box sees a point, from its lower corner, in fractions of its size; None outside."""
    x, y, z, dx, dy, dz, angle = roi
    ax, ay = point[0] - x, point[1] - y
    u, v = ax * math.cos(angle) + ay * math.sin(angle), ay * math.cos(angle) - ax * math.sin(angle)
    inside = abs(u) < dx / 2 and abs(v) < dy / 2 and abs(point[2] - (z + dz / 2)) <= dz / 2
    return (u / dx + 0.5, v / dy + 0.5, (point[2] - z) / dz) if inside else None


def loop(rois, points, feats, out_size, max_points, mode):
    """Differentiable in the features; the box and point closest to a bound decide nothing in these tests."""
    rows = []
    members = torch.zeros(len(rois), *out_size, max_points, dtype=torch.int32)
    source = torch.full((len(rois), *out_size, feats.shape[1]), -1, dtype=torch.int32)
    for r, roi in enumerate(rois.double().tolist()):
        cells = {}
        for i, point in enumerate(points.double().tolist()):
            if (where := local(point, roi)) is not None:
                cell = tuple(min(int(w * n), n - 1) for w, n in zip(where, out_size, strict=True))
                if len(cells.setdefault(cell, [])) < max_points - 1:
                    cells[cell].append(i)
        for cell in torch.cartesian_prod(*[torch.arange(n) for n in out_size]).view(-1, 3).tolist():
            held = cells.get(tuple(cell), [])
            members[r, *cell, 0] = len(held)
            members[r, *cell, 1 : 1 + len(held)] = torch.tensor(held, dtype=torch.int32)
            if not held:
                rows.append(torch.zeros_like(feats[:1].sum(0)))
            elif mode == "avg":
                rows.append(feats[held].sum(0) / len(held))
            else:
                best = (feats[held].detach() == feats[held].detach().amax(0)).int().argmax(0)
                rows.append(feats[held].gather(0, best.unsqueeze(0)).squeeze(0))
                source[r, *cell] = torch.tensor(held)[best].int()
    pooled = torch.stack(rows).view(len(rois), *out_size, feats.shape[1])
    return pooled, source if mode == "max" else torch.empty(0, dtype=torch.int32), members


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(("out_size", "max_points"), [((3, 2, 4), 6), ((1, 1, 1), 128), ((2, 2, 2), 1)], ids=str)
def test_is_a_loop_over_boxes(out_size, max_points, mode, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the reference's")
    rois, points = boxes(6), torch.randn(300, 3) * 1.5
    feats = (torch.randint(-9, 9, (300, 5)) / 4).to(dtype).requires_grad_()
    places = (rois.double(), points.double()) if dtype == torch.float64 else (rois, points)
    found = roi_aware_pool(*places, feats, out_size, max_points, mode)
    exact = feats.detach().double().requires_grad_()
    wanted = loop(rois, points, exact, out_size, max_points, mode)
    assert found[0].dtype == dtype
    assert_close("pooled", wanted[0], found[0], 0 if mode == "max" else RATIO[dtype])
    for right, each in zip(wanted[1:], found[1:], strict=True):
        assert each.dtype == torch.int32
        assert torch.equal(each, right)
    assert max_points == 1 or found[2][..., 0].max() > 1
    grad = torch.randn(found[0].shape).to(dtype)
    (value,) = torch.autograd.grad(found[0], feats, grad)
    right = torch.zeros_like(exact)
    if wanted[0].requires_grad:
        (right,) = torch.autograd.grad(wanted[0], exact, grad.double())
    assert_close("grad", right, value, RATIO[dtype])


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_gradients(mode):
    feats = torch.randperm(120).view(40, 3).double().requires_grad_()
    rois, points = boxes(3).double(), torch.randn(40, 3).double()
    assert torch.autograd.gradcheck(lambda x: roi_aware_pool(rois, points, x, (2, 2, 1), 9, mode)[0], feats)


@pytest.mark.parametrize("samples", [1, 5, 40, 400])
def test_first_points_of_each_box_over_and_over(samples, backend):
    rois = torch.stack([boxes(5, seed) for seed in range(2)])
    rois[1, 2, :3] = 100.0
    points, feats = torch.randn(2, 200, 3) * 1.5, torch.randn(2, 200, 4, requires_grad=True)
    pooled, empty = roi_point_pool(points, feats, rois, samples)
    assert empty.dtype == torch.int32
    assert pooled.shape == (2, 5, samples, 7)
    for b in range(2):
        for r in range(5):
            inside = [i for i, p in enumerate(points[b].tolist()) if local(p, rois[b, r].tolist()) is not None]
            assert empty[b, r] == (not inside)
            taken = [inside[:samples][s % min(len(inside), samples)] for s in range(samples)] if inside else []
            wanted = torch.cat((points[b], feats[b]), 1)[taken] if inside else torch.zeros(samples, 7)
            assert torch.equal(pooled[b, r], wanted)
    assert empty[1, 2]
    assert torch.autograd.grad(pooled.sum(), feats)[0].any()


def test_bounds_belong_to_a_box_above_and_below_alone(backend):
    rois = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0]])
    points = torch.tensor([[0.0, 0, 0], [0, 0, 2], [1, 0, 1], [0, -1, 1], [0, 0, -1e-6], [0.999, -0.999, 1]])
    members = roi_aware_pool(rois, points, torch.ones(6, 1), (1, 1, 1), 10)[2]
    assert members.flatten()[:4].tolist() == [3, 0, 1, 5]
    cells = roi_aware_pool(rois, points, torch.ones(6, 1), (2, 2, 2), 10)[2][0, ..., 0]
    assert cells.sum() == 3
    assert cells[1, 1, 0] == cells[1, 1, 1] == cells[1, 0, 1] == 1


def test_what_is_not_a_number(backend):
    nan = float("nan")
    rois = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0], [nan, 0, 0, 2, 2, 2, 0], [0, 0, 0, 2, 2, nan, 0],
                         [0, 0, 0, 2, 2, 2, nan], [0, 0, 0, 0, 2, 2, 0], [0, 0, 1, 2, 2, 0, 0],
                         [0, 0, 0, -2, 2, 2, 0], [0, 0, 0, float("inf"), 2, 2, 0]])  # fmt: skip
    points = torch.tensor([[0.0, 0, 1], [nan, 0, 1], [0, 0, nan], [float("inf"), 0, 1], [0.5, 0, 1]])
    feats = torch.tensor([[nan, 1.0, -float("inf")], [7, 7, 7], [7, 7, 7], [7, 7, 7], [2, nan, -float("inf")]])
    pooled, source, members = roi_aware_pool(rois, points, feats, (1, 1, 1), 9)
    assert members[:, 0, 0, 0, 0].tolist() == [2, 0, 0, 0, 0, 2, 0, 2]
    assert pooled[0].flatten().tolist() == [2, 1, 0]
    assert source[0].flatten().tolist() == [4, 0, -1]
    assert roi_point_pool(points[None], feats[None], rois[None], 3)[1].tolist() == [[0, 1, 1, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize(("count", "points"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["max", "avg"])
def test_no_boxes_or_points(count, points, mode, backend):
    feats = torch.randn(points, 2, requires_grad=True)
    pooled, source, members = roi_aware_pool(boxes(count), torch.zeros(points, 3) + 50, feats, (2, 1, 3), 4, mode)
    assert torch.equal(pooled, torch.zeros(count, 2, 1, 3, 2))
    assert torch.equal(members, torch.zeros(count, 2, 1, 3, 4, dtype=torch.int32))
    assert source.eq(-1).all()
    assert torch.autograd.grad(pooled.sum(), feats)[0].eq(0).all()
    found, empty = roi_point_pool(torch.zeros(1, points, 3) + 50, feats[None], boxes(count)[None], 4)
    assert torch.equal(found, torch.zeros(1, count, 4, 5))
    assert empty.eq(1).all()


def test_threads_do_not_change_the_result():
    pytest.importorskip("numba")
    found = []
    arguments = boxes(30), torch.randn(2000, 3), torch.randn(2000, 16)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(roi_aware_pool(*arguments, (3, 3, 3), 20, "avg"))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_they_are_sound_ops(mode, backend):
    rois, points, feats = boxes(3), torch.randn(40, 3), torch.randn(40, 2)
    pooled, source, members = roi_aware_pool(rois, points, feats, (2, 2, 2), 5, mode)
    torch.library.opcheck(GRADIENT._overload, (torch.randn(pooled.shape), source, members, 40, mode))
    outputs = torch.zeros_like(pooled), source, torch.zeros_like(members)
    torch.library.opcheck(AWARE._overload, (rois, points, feats, *outputs, mode))
    torch.library.opcheck(INSIDE._overload, (points[None], rois[None], 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rois": torch.zeros(2, 6)}, r"rois is torch\.float32 \(2, 6\) on cpu, expected .* the last 7"),
        ({"points": torch.zeros(5, 2)}, r"points is torch\.float32 \(5, 2\)"),
        ({"feats": torch.zeros(4, 2)}, r"feats \(4, 2\): sizes differ"),
        ({"feats": torch.zeros(5, 2).int()}, r"feats is torch\.int32"),
        ({"rois": torch.zeros(2, 7).double()}, r"rois is torch\.float64, points torch\.float32"),
        ({"out_size": (2, 2)}, r"out_size is \(2, 2\)"),
        ({"out_size": (2, 0, 2)}, r"out_size is \(2, 0, 2\)"),
        ({"max_points": 0}, "max_points 0"),
        ({"mode": "mean"}, "mode 'mean'"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {"rois": torch.zeros(2, 7), "points": torch.zeros(5, 3), "feats": torch.zeros(5, 2),
             "out_size": (2, 2, 2), "max_points": 3}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        roi_aware_pool(**right | change)


def test_too_few_samples_are_named():
    with pytest.raises(ValueError, match="samples is 0"):
        roi_point_pool(torch.zeros(1, 5, 3), torch.zeros(1, 5, 2), torch.zeros(1, 2, 7), 0)


def test_memory_that_is_there_and_not_contiguous(backend):
    rois, points, feats = boxes(3), torch.randn(40, 3), torch.randn(40, 2)
    wanted = roi_aware_pool(rois, points, feats, (2, 1, 2), 5)
    if backend == "cpu":
        outputs = [torch.zeros(3, 2, 1, 2, 2), torch.zeros(3, 2, 1, 2, 2).int(), torch.zeros(3, 2, 1, 2, 5).int()]
    else:
        outputs = [torch.zeros_like(each).transpose(1, 3) for each in wanted]
    roi_aware_pool_into(rois, points, feats, *outputs)
    assert all(torch.equal(*pair) for pair in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_memory_that_does_not_fit_is_named(place):
    outputs = [torch.zeros(3, 2, 1, 2, 2), torch.zeros(3, 2, 1, 2, 2).int(), torch.zeros(3, 2, 1, 2, 5).int()]
    outputs[place] = outputs[place][:2]
    with pytest.raises(ValueError, match=f"{('pooled', 'source', 'members')[place]} is"):
        roi_aware_pool_into(boxes(3), torch.zeros(4, 3), torch.zeros(4, 2), *outputs)
