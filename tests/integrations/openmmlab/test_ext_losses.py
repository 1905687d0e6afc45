"""mmcv's focal losses against the formulas in float64."""

import mmcv.ops
import pytest
import torch
import torch.nn.functional as F

from kernelgraft_core.runtime.testing import assert_close, rng

WEIGHT = torch.tensor([0.5, 2.0, 3.0])


def sigmoid_definition(x, target, weight):
    p, meant = x.sigmoid(), F.one_hot(target, 4)[:, :3].bool()
    loss = torch.where(meant, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    factors = 1 if weight is None else torch.cat((weight.double(), torch.ones(1))).double()[target].unsqueeze(1)
    return loss * factors


def softmax_definition(x, target, weight):
    p = x.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    return -0.25 * (1 - p) ** 2 * p.log() * (1 if weight is None else weight.double()[target])


SIGMOID = ("SigmoidFocalLoss", sigmoid_definition, 4)
SOFTMAX = ("SoftmaxFocalLoss", softmax_definition, 3)


# Without reduction mmcv's own Python cannot take the gradient of the softmax: it multiplies (N, C) by (N,).
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize(
    ("loss", "reduction"), [(SIGMOID, "none"), (SIGMOID, "mean"), (SIGMOID, "sum"), (SOFTMAX, "mean"), (SOFTMAX, "sum")]
)
def test_values_and_gradients(loss, reduction, weight):
    name, definition, classes = loss
    x = torch.randn(9, 3, generator=rng()).requires_grad_()
    exact = x.detach().double().requires_grad_()
    target = torch.randint(classes, (9,), generator=rng(1))
    found = getattr(mmcv.ops, name)(2.0, 0.25, weight, reduction)(x, target)
    wanted = definition(exact, target, weight)
    wanted = {"none": wanted, "mean": wanted.sum() / 9, "sum": wanted.sum()}[reduction]
    assert_close("loss", wanted, found, 1e-5)
    found.sum().backward()
    wanted.sum().backward()
    assert_close("gradient", exact.grad, x.grad, 1e-5)
