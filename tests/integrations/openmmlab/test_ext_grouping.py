"""mmcv's neighbours and groups on our ops: what compiled mmcv 2.1 computes."""

import pytest
import torch
from mmcv.ops import (
    QueryAndGroup,
    assign_score_withk,
    ball_query,
    chamfer_distance,
    grouping_operation,
    three_interpolate,
    three_nn,
)

from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_openmmlab.ext import grouping as ext


def lattice(*shape):
    return torch.randint(0, 5, (*shape, 3)) / 2  # many distances are equal, and all are exact


def squares(points, centers):
    return (centers.unsqueeze(-2) - points.unsqueeze(-3)).square().sum(-1)


def check(out, leaves, wanted, exact, ratio=1e-6):
    """Equal in value and in all gradients."""
    assert_close("y", wanted, out, ratio)
    grad = torch.randn(out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, grad)
    for i, (right, each) in enumerate(zip(torch.autograd.grad(wanted, exact, grad.double()), found, strict=True)):
        assert_close(f"grad {i}", right, each, ratio)


def doubled(*leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize(("low", "high", "samples"), [(0, 0.6, 4), (0.5, 1.0, 9), (1.0, 1.1, 3), (0, 50.0, 5)])
def test_ball_query(low, high, samples):
    points, centers = lattice(2, 80), torch.cat((lattice(2, 15), torch.full((2, 1, 3), 90.0)), 1)
    found = ball_query(low, high, samples, points, centers)
    assert found.dtype == torch.int32
    away = squares(points, centers)
    near = (away == 0) | ((away >= low * low) & (away < high * high))
    for rows, mask in zip(found.flatten(0, 1), near.flatten(0, 1), strict=True):
        inside = mask.nonzero().flatten().tolist()[:samples]
        # Filled with the first; 0 as mmcv's wrapper leaves it where there is none.
        assert rows.tolist() == (inside + inside[:1] * samples)[:samples] if inside else rows.eq(0).all()


def test_ball_query_of_clouds_one_after_another():
    counts, members = torch.tensor([30, 1, 25], dtype=torch.int32), torch.tensor([4, 2, 5], dtype=torch.int32)
    points, centers = lattice(56), lattice(11)
    centers[5] = 90.0
    found = ball_query(0, 0.8, 4, points, centers, counts, members)
    cloud = torch.arange(3).repeat_interleave(members)
    for m, rows in enumerate(found):
        first = int(counts[: cloud[m]].sum())
        known = points[first : first + counts[cloud[m]]]
        inside = (squares(known, centers[m : m + 1])[0] < 0.8 * 0.8).nonzero().flatten().tolist()[:4]
        assert rows.tolist() == ((inside + inside[:1] * 4)[:4] if inside else [-1, 0, 0, 0])
    assert found[5, 0] == -1


@pytest.mark.parametrize("count", [1, 4, 60])
def test_k_nearest(count):
    points, centers = lattice(2, count), lattice(2, 9)
    index, away = torch.empty(2, 9, 4, dtype=torch.int32), torch.empty(2, 9, 4)
    ext.knn_forward(points, centers, index, away, b=2, n=count, m=9, nsample=4)
    right, order = squares(points, centers).sort(dim=2, stable=True)
    missing = max(0, 4 - count)
    assert torch.equal(index, torch.nn.functional.pad(order[..., :4], (0, missing)).int())
    assert torch.equal(away, torch.nn.functional.pad(right[..., :4], (0, missing), value=1e10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 60])
def test_three_nearest(count, dtype):
    sources, targets = lattice(2, count).to(dtype), lattice(2, 9).to(dtype)
    away, index = three_nn(targets, sources)
    right, order = squares(sources, targets).sort(dim=2, stable=True)
    missing, far = max(0, 3 - count), torch.tensor(1e40, dtype=torch.float64).to(dtype).item()
    assert torch.equal(index, torch.nn.functional.pad(order[..., :3], (0, missing)).int())
    assert torch.equal(away, torch.nn.functional.pad(right[..., :3], (0, missing), value=far).sqrt())


def test_interpolation():
    feats = torch.randn(2, 5, 7, requires_grad=True)
    index, weight = torch.randint(7, (2, 11, 3), dtype=torch.int32), torch.rand(2, 11, 3)
    (exact,) = doubled(feats)
    near = torch.stack([each[:, rows.long()] for each, rows in zip(exact, index, strict=True)])
    check(three_interpolate(feats, index, weight), [feats], (near * weight.unsqueeze(1)).sum(3), [exact])


def test_groups():
    feats, index = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 4, 3), dtype=torch.int32)
    (exact,) = doubled(feats)
    wanted = torch.stack([each[:, rows.long()] for each, rows in zip(exact, index, strict=True)])
    check(grouping_operation(feats, index), [feats], wanted, [exact])


def test_groups_of_clouds_one_after_another():
    counts, members = torch.tensor([4, 6], dtype=torch.int32), torch.tensor([3, 5], dtype=torch.int32)
    feats, index = torch.randn(10, 5, requires_grad=True), torch.randint(0, 4, (8, 3), dtype=torch.int32)
    (exact,) = doubled(feats)
    wanted = exact[index.long() + torch.tensor([0] * 3 + [4] * 5).unsqueeze(1)].transpose(1, 2)
    check(grouping_operation(feats, index, counts, members), [feats], wanted, [exact])


def test_query_and_group():
    points, centers, feats = lattice(2, 60), lattice(2, 9), torch.randn(2, 4, 60)
    found, rows = QueryAndGroup(1.1, 5, return_grouped_idx=True)(points, centers, feats)
    assert found.shape == (2, 7, 9, 5)
    for b in range(2):
        torch.testing.assert_close(found[b, 3:], feats[b][:, rows[b].long()])
        torch.testing.assert_close(found[b, :3], (points[b][rows[b].long()] - centers[b][:, None]).permute(2, 0, 1))


def test_chamfer():
    x, y = torch.randn(2, 30, 2, requires_grad=True), torch.randn(2, 17, 2, requires_grad=True)
    there, back, rows, back_rows = chamfer_distance(x, y)
    exact = doubled(x, y)
    away = squares(exact[1], exact[0])
    assert torch.equal(rows, away.argmin(2).int())
    assert torch.equal(back_rows, away.argmin(1).int())
    wanted = torch.cat((away.amin(2), away.amin(1)), 1)
    check(torch.cat((there, back), 1), [x, y], wanted, exact)


def test_chamfer_of_nothing():
    there, back, rows, _ = chamfer_distance(torch.zeros(1, 3, 2), torch.zeros(1, 0, 2))
    assert there.eq(0).all()
    assert rows.eq(0).all()
    assert back.shape == (1, 0)


@pytest.mark.parametrize("aggregate", ["sum", "avg", "max"])
def test_scores(aggregate):
    """mmcv's kernels do not look at the way of aggregation."""
    leaves = [
        torch.randn(shape, requires_grad=True) for shape in ((2, 5, 4, 3), (2, 7, 3, 6), (2, 7, 3, 6))
    ]  # fmt: skip
    index = torch.randint(-1, 9, (2, 5, 4))
    index[..., 0] = index[..., 0].clamp(0, 6)
    scores, points, centers = exact = doubled(*leaves)
    there = ((index >= 0) & (index < 7)).unsqueeze(3)
    batch = torch.arange(2).view(2, 1, 1)
    difference = points[batch, index.clamp(0, 6)] - centers[batch, index[..., :1]]
    wanted = torch.einsum("bpkm,bpkmo->bopk", scores * there, difference)
    check(assign_score_withk(*leaves, index, aggregate), leaves, wanted, exact)
