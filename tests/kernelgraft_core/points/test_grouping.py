"""Gathering by number: equal to dense indexing in float64, forward and gradients."""

import pytest
import torch

from kernelgraft_core.points import (
    assign_scores,
    chamfer_distance,
    gather_points,
    group_stacked_points,
    three_interpolate,
)
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=str)


def compare(function, definition, tensors, dtype, *others):
    """A function against its definition in float64, and its gradients in all ``tensors``."""
    leaves = [each.to(dtype).requires_grad_() for each in tensors]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    out, wanted = function(*leaves, *others), definition(*exact, *others)
    assert out.dtype == dtype
    assert_close("y", wanted, out, RATIO[dtype])
    grad = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, leaves, grad)
    for i, (right, each) in enumerate(zip(torch.autograd.grad(wanted, exact, grad.double()), found, strict=True)):
        assert_close(f"grad {i}", right, each, RATIO[dtype])


def gathered(feats, index):
    return torch.stack([each[:, rows.long()] for each, rows in zip(feats, index, strict=True)])


@DTYPES
@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 1)], ids=str)
def test_gather(shape, dtype):
    compare(gather_points, gathered, [torch.randn(2, 3, 9)], dtype, torch.randint(9, (2, *shape), dtype=torch.int32))


def test_gather_nothing():
    feats = torch.randn(2, 3, 9, requires_grad=True)
    out = gather_points(feats, torch.zeros(2, 0, 4, dtype=torch.int64))
    assert out.shape == (2, 3, 0, 4)
    assert torch.autograd.grad(out.sum(), feats)[0].eq(0).all()
    with pytest.raises(RuntimeError, match="out of bounds"):
        gather_points(feats, torch.full((2, 1), 9))


@DTYPES
def test_group_of_clouds_one_after_another(dtype):
    counts, members = torch.tensor([4, 0, 6], dtype=torch.int32), torch.tensor([3, 2, 5], dtype=torch.int32)
    index = torch.randint(-1, 8, (10, 3), dtype=torch.int32)

    def definition(feats):
        whole = torch.cat((feats, torch.zeros_like(feats[:1])))
        first, rows = counts.cumsum(0) - counts, []
        for row, cloud in zip(index.tolist(), torch.arange(3).repeat_interleave(members).tolist(), strict=True):
            rows.append([first[cloud] + i if 0 <= i < counts[cloud] else -1 for i in row])
        return whole[torch.tensor(rows)].transpose(1, 2)

    compare(lambda x: group_stacked_points(x, index, counts, members), definition, [torch.randn(10, 5)], dtype)


def test_group_of_no_clouds():
    none = torch.zeros(0, dtype=torch.int32)
    assert group_stacked_points(torch.zeros(0, 5), torch.zeros(0, 3).int(), none, none).shape == (0, 5, 3)
    out = group_stacked_points(torch.zeros(0, 5), torch.zeros(2, 3).int(), torch.tensor([0]), torch.tensor([2]))
    assert torch.equal(out, torch.zeros(2, 5, 3))


@DTYPES
@pytest.mark.parametrize("near", [1, 3])
def test_interpolation(near, dtype):
    index = torch.randint(6, (2, 11, near), dtype=torch.int32)
    compare(
        lambda feats, weight: three_interpolate(feats, index, weight),
        lambda feats, weight: (gathered(feats, index) * weight.unsqueeze(1)).sum(3),
        [torch.randn(2, 4, 6), torch.rand(2, 11, near)], dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_chamfer(dimensions, dtype):
    x, y = torch.randn(2, 30, dimensions), torch.randn(2, 17, dimensions)

    def definition(a, b):
        away = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(3)
        return torch.cat((away.amin(2), away.amin(1)), 1)

    compare(lambda a, b: torch.cat(chamfer_distance(a, b)[:2], 1), definition, [x, y], dtype)
    away = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3)
    there, back = chamfer_distance(x, y)[2:]
    assert torch.equal(there, away.argmin(2).int())
    assert torch.equal(back, away.argmin(1).int())


def test_chamfer_of_nothing_and_of_what_is_no_place():
    away, back, rows, back_rows = chamfer_distance(torch.zeros(1, 3, 2), torch.zeros(1, 0, 2))
    assert away.isinf().all()
    assert rows.eq(-1).all()
    assert back.shape == back_rows.shape == (1, 0)
    away, _, rows, _ = chamfer_distance(torch.tensor([[[float("nan"), 0]]]), torch.zeros(1, 2, 2))
    assert away.isinf().all()
    assert rows.eq(-1).all()


@DTYPES
def test_scores(dtype):
    index = torch.randint(-1, 8, (2, 5, 4))  # -1 and 7 are none
    index[:, :, 0] %= 7

    def definition(scores, points, centers):
        there = ((index >= 0) & (index < 7)).unsqueeze(3)
        batch = torch.arange(2).view(2, 1, 1)
        difference = points[batch, index.clamp(0, 6)] - centers[batch, index[..., :1].clamp(0, 6)]
        return torch.einsum("bpkm,bpkmo->bopk", scores * there, difference)

    tensors = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 3, 6), torch.randn(2, 7, 3, 6)
    compare(lambda s, p, c: assign_scores(s, p, c, index), definition, tensors, dtype)


def test_scores_of_no_points():
    out = assign_scores(torch.zeros(1, 2, 3, 4), *[torch.zeros(1, 0, 4, 5)] * 2, torch.zeros(1, 2, 3).long())
    assert torch.equal(out, torch.zeros(1, 5, 2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather_points(torch.zeros(2, 3), torch.zeros(2, 1).int()), r"feats is \(2, 3\)"),
        (lambda: gather_points(torch.zeros(2, 3, 4), torch.zeros(2, 1)), r"index torch\.float32"),
        (lambda: three_interpolate(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).int(), torch.zeros(1, 2, 2)), "weight"),
        (lambda: chamfer_distance(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), "D 2 or 3"),
        (lambda: group_stacked_points(torch.zeros(2, 3), torch.zeros(4).int(), *[torch.ones(1).int()] * 2), "index"),
        (lambda: group_stacked_points(torch.zeros(2, 3), torch.zeros(4, 1).int(), torch.ones(1).int(),
                                      torch.ones(2).int()), "index_counts"),
        (lambda: assign_scores(torch.zeros(1, 2, 3, 4), *[torch.zeros(1, 5, 3, 6)] * 2, torch.zeros(1, 2, 3).int()),
         r"points \(1, 5, 3, 6\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
