"""Focal losses and their gradients against the formulas of the paper."""

import pytest
import torch
import torch.nn.functional as F

from kernelgraft_core.runtime.testing import assert_close, rng
from kernelgraft_core.vision.focal_loss import (
    sigmoid_focal_loss,
    sigmoid_focal_loss_backward,
    softmax_focal_loss,
    softmax_focal_loss_backward,
)

TARGET = torch.tensor([0, 2, 3, 1, -1, 2, 7])
WEIGHT = torch.tensor([0.5, 2.0, 3.0], dtype=torch.double)


def sigmoid_definition(x, target, gamma, alpha, weight):
    p = x.sigmoid()
    meant = F.one_hot(torch.where((target >= 0) & (target < 3), target, 3), 4)[:, :3].bool()
    loss = torch.where(meant, -alpha * (1 - p) ** gamma * p.log(), -(1 - alpha) * p**gamma * (1 - p).log())
    if weight is None:
        return loss
    return loss * torch.tensor([float(weight[t]) if 0 <= t < 3 else 1.0 for t in target.tolist()]).view(-1, 1)


def softmax_definition(x, target, gamma, alpha, weight):
    p = x.softmax(1)
    out = []
    for row, t in zip(p, target.tolist(), strict=True):
        factor = 1.0 if weight is None else weight[t]
        out.append(-alpha * factor * (1 - row[t]) ** gamma * row[t].log() if t >= 0 else row.sum() * 0)
    return torch.stack(out)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.3, 0.9)])
def test_sigmoid_focal_loss(gamma, alpha, weight):
    x = torch.randn(7, 3, dtype=torch.double, generator=rng()).requires_grad_()
    found = sigmoid_focal_loss(x, TARGET, gamma, alpha, weight)
    wanted = sigmoid_definition(x, TARGET, gamma, alpha, weight)
    assert_close("loss", wanted, found, 1e-12)
    grad = torch.randn(7, 3, dtype=torch.double, generator=rng(1))
    right, mine = (torch.autograd.grad(out, x, grad)[0] for out in (wanted, found))
    assert_close("grad", right, mine, 1e-12)
    assert_close("grad", right, grad * sigmoid_focal_loss_backward(x, TARGET, gamma, alpha, weight), 1e-12)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (0.5, 0.9)])
def test_softmax_focal_loss(gamma, alpha, weight):
    target = torch.tensor([0, 2, 2, 1, -1, 2, 0])
    x = torch.randn(7, 3, dtype=torch.double, generator=rng()).requires_grad_()
    wanted = softmax_definition(x, target, gamma, alpha, weight)
    p = x.detach().softmax(1)
    assert_close("loss", wanted, softmax_focal_loss(p, target, gamma, alpha, weight), 1e-12)
    grad = torch.randn(7, dtype=torch.double, generator=rng(1))
    (right,) = torch.autograd.grad(wanted, x, grad)
    mine = grad.unsqueeze(1) * softmax_focal_loss_backward(p, target, gamma, alpha, weight)
    assert_close("grad", right, mine, 1e-12)


def test_certain_answers_stay_finite():
    x = torch.tensor([[200.0, -200.0, 1e30], [-1e30, 200.0, -200.0]])
    target = torch.tensor([1, 1])
    assert sigmoid_focal_loss(x, target).isfinite().all()
    assert sigmoid_focal_loss_backward(x, target, 2.0, 0.25, None).isfinite().all()
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for gamma in (0.0, 0.5, 2.0):
        assert softmax_focal_loss(p, target, gamma).isfinite().all()
        assert softmax_focal_loss_backward(p, target, gamma, 0.25, None).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_and_nothing(dtype):
    x = torch.randn(7, 3, generator=rng()).to(dtype)
    found = sigmoid_focal_loss(x, TARGET)
    assert found.dtype == dtype
    assert_close("loss", sigmoid_definition(x.double(), TARGET, 2.0, 0.25, None), found, 1e-2)
    assert sigmoid_focal_loss(x[:0], TARGET[:0]).shape == (0, 3)
    assert softmax_focal_loss(x[:0], TARGET[:0]).shape == (0,)


def test_what_does_not_fit_is_refused():
    x, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for args, message in (
        ((x[0], target), "expected floating point"),
        ((x, target.int()), "target is torch.int32"),
        ((x, target[:1]), r"target is torch.int64 \(1,\)"),
        ((x, target, 2.0, 0.25, torch.ones(2)), "weight is"),
    ):
        with pytest.raises(ValueError, match=message):
            sigmoid_focal_loss(*args)
    with pytest.raises(ValueError, match="goes up to 3, there are 3 classes"):
        softmax_focal_loss(x, target + 3)
