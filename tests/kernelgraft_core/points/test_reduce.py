"""Reducing points of voxels: every backend equals a loop, forward and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.points import reduce_groups, scatter_points, voxel_groups
from kernelgraft_core.points.reduce.ops import REDUCE, largest_rows, pass_to_largest
from kernelgraft_core.points.sums import sum_numbers, sum_rows
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
REDUCTIONS = ["sum", "mean", "max"]


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def loop(feats, coordinates, reduce):
    """Differentiable, in the type of the features; the first of equal numbers is the maximum."""
    groups = {}
    for i, site in enumerate(coordinates.tolist()):
        if min(site) >= 0:
            groups.setdefault(tuple(site), []).append(i)
    out = []
    for site in sorted(groups):
        rows = feats[groups[site]]
        if reduce == "max":
            best = rows.detach().nan_to_num(nan=-torch.inf).amax(0)
            first = (rows.detach() == best).int().argmax(0)
            out.append(rows.gather(0, first.unsqueeze(0)).squeeze(0))
        else:
            out.append(rows.sum(0) if reduce == "sum" else rows.sum(0) / len(rows))
    sites = torch.tensor(sorted(groups), dtype=coordinates.dtype).view(-1, coordinates.shape[1])
    counts = torch.tensor([len(groups[site]) for site in sorted(groups)], dtype=torch.int32)
    voxels = torch.full((len(feats),), -1, dtype=torch.int32)
    for voxel, site in enumerate(sorted(groups)):
        voxels[groups[site]] = voxel
    return torch.stack(out) if out else feats[:0], sites, voxels, counts


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("points", "channels", "sites"), [(1, 1, 1), (300, 7, 3), (500, 64, 12), (40, 3, 1)], ids=str)
def test_is_a_loop_over_the_voxels(points, channels, sites, reduce, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the reference's")
    coordinates = torch.randint(-1, sites, (points, 3), dtype=torch.int32)
    # Few values, so that maxima are often equal.
    feats = (torch.randint(-9, 9, (points, channels)) / 4).to(dtype) if reduce == "max" else None
    feats = (torch.randn(points, channels).to(dtype) if feats is None else feats).requires_grad_()
    out, *rest = scatter_points(feats, coordinates, reduce)
    exact = feats.detach().double().requires_grad_()
    wanted, *others = loop(exact, coordinates, reduce)
    assert out.dtype == dtype
    assert_close("y", wanted, out, 0 if reduce == "max" else RATIO[dtype])
    for right, found in zip(others, rest, strict=True):
        assert found.dtype == right.dtype
        assert torch.equal(found, right)
    if len(out):
        grad = torch.randn(out.shape).to(dtype)
        (found,) = torch.autograd.grad(out, feats, grad)
        (right,) = torch.autograd.grad(wanted, exact, grad.double())
        assert_close("grad", right, found, 0 if reduce == "max" else RATIO[dtype])


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients_of_gradients(reduce, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    groups = voxel_groups(torch.randint(-1, 3, (12, 2)))
    feats = torch.randperm(48).view(12, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reduce_groups(x, groups.order, groups.starts, reduce), feats)
    assert torch.autograd.gradgradcheck(lambda x: reduce_groups(x, groups.order, groups.starts, reduce), feats)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("coordinates", [[], [[-1, 3]], [[5, 0], [-1, -1], [0, 7], [5, 0]]], ids=str)
def test_groups(coordinates, dtype, backend):
    coordinates = torch.tensor(coordinates, dtype=dtype).view(-1, 2)
    feats = torch.randn(len(coordinates), 3)
    for wanted, found in zip(loop(feats, coordinates, "max"), scatter_points(feats, coordinates, "max"), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_groups_that_are_in_order_already(backend):
    coordinates = torch.arange(9).unsqueeze(1)
    groups = voxel_groups(coordinates)
    assert torch.equal(groups.order, torch.arange(9))
    assert torch.equal(groups.coordinates, coordinates)
    assert groups.counts.eq(1).all()


def test_coordinates_that_no_number_has_room_for():
    far = torch.tensor([[1 << 40, 1, 1 << 40], [3, 1 << 50, 2], [1 << 40, 1, 1 << 40], [-1, 2, 1 << 40]])
    groups = voxel_groups(far)
    assert groups.coordinates.tolist() == [[3, 1 << 50, 2], [1 << 40, 1, 1 << 40]]
    assert groups.rows.tolist() == [1, 0, 1, -1]
    assert groups.order.tolist() == [1, 0, 2]


def test_what_is_not_a_number_is_no_maximum(backend):
    nan, inf = float("nan"), float("inf")
    feats = torch.tensor([[nan, nan, -inf, 1.0], [2.0, nan, nan, inf], [2.0, nan, -inf, inf]], requires_grad=True)
    out, *_ = scatter_points(feats, torch.zeros(3, 1, dtype=torch.int32), "max")
    assert out.tolist() == [[2.0, -inf, -inf, inf]]
    out.backward(torch.ones_like(out))
    assert feats.grad.tolist() == [[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_groups_without_members(reduce, backend):
    feats = torch.randn(4, 2, requires_grad=True)
    out = reduce_groups(feats, torch.tensor([2, 0]), torch.tensor([0, 0, 2, 2]), reduce)
    torch.testing.assert_close(out[1], getattr(feats[[0, 2]], "amax" if reduce == "max" else reduce)(0))
    assert out[[0, 2]].eq(-float("inf") if reduce == "max" else 0).all()
    out[1].sum().backward()
    assert feats.grad.sum(0).tolist() == ([2, 2] if reduce == "sum" else [1, 1])


def test_the_largest_of_groups_in_any_order(backend):
    feats = torch.tensor([[1.0, 5], [3, 5], [3, 0], [9, 9]])
    rows = largest_rows(feats, torch.tensor([2, 0, 0, -1]), 4)
    assert rows.tolist() == [[1, 1], [-1, -1], [0, 0], [-1, -1]]
    grad = pass_to_largest(torch.arange(8.0).view(4, 2), rows, 4)
    assert grad.tolist() == [[4, 5], [0, 1], [0, 0], [0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_sums_of_rows(count, channels, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-99, 99, (count, channels), generator=generator) / 8  # whose sums are exact
    index = torch.randint(-1, rows, (count,), generator=generator)
    wanted = torch.zeros(rows, channels)
    for i, row in enumerate(index.tolist()):
        if row >= 0:
            wanted[row] += values[i]
    assert torch.equal(sum_rows(values, index, rows), wanted)
    inside = index >= 0
    assert torch.equal(sum_numbers(values[inside, 0], index[inside], rows), wanted[:, 0])


def test_threads_do_not_change_the_result():
    pytest.importorskip("numba")
    feats, coordinates, found = torch.randn(20_000, 32), torch.randint(20, (20_000, 3)), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(scatter_points(feats, coordinates, "sum")[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_it_is_a_sound_op(reduce, backend):
    groups = voxel_groups(torch.randint(-1, 3, (30, 2)))
    feats = torch.randn(30, 4, requires_grad=True)
    torch.library.opcheck(REDUCE._overload, (feats, groups.order, groups.starts, reduce))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feats": torch.zeros(3)}, r"feats is torch\.float32 \(3,\)"),
        ({"feats": torch.zeros(3, 2).int()}, r"feats is torch\.int32"),
        ({"coordinates": torch.zeros(2, 2).int()}, r"coordinates is \(2, 2\) on cpu, feats \(3, 2\)"),
        ({"coordinates": torch.zeros(3, 2)}, r"coordinates is torch\.float32 \(3, 2\), expected"),
        ({"reduce": "median"}, "reduce is 'median', expected one of"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {"feats": torch.zeros(3, 2), "coordinates": torch.zeros(3, 2).int(), "reduce": "sum"}
    with pytest.raises(ValueError, match=message):
        scatter_points(**right | change)


@pytest.mark.parametrize(
    ("order", "starts", "message"),
    [
        ([0, 3], [0, 2], "order goes from 0 to 3, expected 0 to 2"),
        ([-1, 0], [0, 2], "order goes from -1 to 0"),
        ([0, 1], [0, 3], r"starts is \[0, 3\], expected to ascend from 0 to 2"),
        ([0, 1], [-1, 2], r"starts is \[-1, 2\]"),
        ([0, 1], [1, 0, 2], r"starts is \[1, 0, 2\]"),
        ([0, 1], [], r"starts is torch\.int64 \(0,\)|order is"),
        ([[0]], [0, 1], r"order is torch\.int64 \(1, 1\)"),
        ([0.0], [0, 1], r"order is torch\.float32 \(1,\)"),
    ],
)
def test_groups_that_are_wrong_are_named(order, starts, message):
    with pytest.raises(ValueError, match=message):
        reduce_groups(torch.zeros(3, 2), torch.tensor(order), torch.tensor(starts, dtype=torch.int64), "sum")
