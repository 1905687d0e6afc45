"""mmcv's deformable convolutions, through its functions and modules, against the definition in float64."""

import mmcv.ops
import pytest
import torch
import torch.nn.functional as F

from kernelgraft_core.runtime.testing import assert_close, rng

from .image_definitions import definitions


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def agrees(found, wanted, leaves, exact):
    assert_close("out", wanted, found, 1e-5)
    grad = randn(*found.shape, seed=9)
    for mine, right in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert_close("gradient", right, mine, 1e-5)


HOW = {
    "plain": ((1, 1), (0, 0), (1, 1), 1, 1),
    "groups": ((2, 1), (1, 2), (1, 2), 2, 4),
    "dilated": ((1, 2), (2, 1), (2, 1), 4, 2),
}


def sizes(how, size=(5, 6), kernel=(3, 2)):
    stride, padding, dilation, *_ = how
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


@pytest.mark.parametrize("name", HOW)
def test_deform_conv2d(name):
    how = HOW[name]
    leaves = [randn(4, 4, 5, 6), randn(4, how[4] * 12, *sizes(how), seed=1), randn(8, 4 // how[3], 3, 2, seed=2)]
    leaves = [each.requires_grad_() for each in leaves]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    found = mmcv.ops.deform_conv2d(*leaves, *how, False, 2)
    agrees(found, definitions.deform_conv2d(*exact, None, None, *how), leaves, exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HOW)
def test_modulated_deform_conv2d(name, bias):
    how, places = HOW[name], sizes(HOW[name])
    x, offset = randn(2, 4, 5, 6), randn(2, how[4] * 12, *places, seed=1)
    mask, weight = torch.rand(2, how[4] * 6, *places, generator=rng(2)), randn(8, 4 // how[3], 3, 2, seed=3)
    leaves = [each.requires_grad_() for each in (x, offset, mask, weight, *([randn(8, seed=4)] if bias else []))]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    found = mmcv.ops.modulated_deform_conv2d(*leaves[:4], leaves[4] if bias else None, *how)
    x, offset, mask, weight, *rest = exact
    wanted = definitions.deform_conv2d(x, offset, weight, rest[0] if rest else None, mask, *how)
    agrees(found, wanted, leaves, exact)


@pytest.mark.parametrize("kind", [mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack])
def test_layers_begin_as_convolutions(kind):
    layer, x = kind(4, 6, 3, padding=1), randn(2, 4, 7, 5)
    factor = 1 if kind is mmcv.ops.DeformConv2dPack else 0.5
    wanted = F.conv2d(x, layer.weight * factor, getattr(layer, "bias", None), padding=1)
    assert_close("out", wanted, layer(x), 1e-6)
    layer(x).sum().backward()
    assert all(each.grad is not None for each in layer.parameters())


def test_an_image_smaller_than_the_kernel():
    layer = mmcv.ops.DeformConv2d(2, 3, 3)
    out = layer(randn(1, 2, 2, 5), torch.zeros(1, 18, 0, 3))
    assert out.shape == (1, 3, 0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    x, offset, weight = randn(1, 2, 4, 4).to(dtype), randn(1, 18, 2, 2, seed=1).to(dtype), randn(3, 2, 3, 3).to(dtype)
    found = mmcv.ops.deform_conv2d(x, offset, weight)
    assert found.dtype == dtype
    wanted = definitions.deform_conv2d(
        *(each.double() for each in (x, offset, weight)), None, None, (1, 1), (0, 0), (1, 1), 1, 1
    )
    assert_close("out", wanted, found, 2e-3 if dtype == torch.float16 else 1e-12)
