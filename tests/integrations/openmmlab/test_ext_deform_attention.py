"""mmcv's multi-scale deformable attention against its own Python fallback in float64."""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

from kernelgraft_core.runtime.testing import assert_close, rng


def arguments(dtype=torch.float32):
    sizes = torch.tensor([[6, 5], [3, 4]])
    keys = sizes.prod(1)
    shape = (2, 7, 4, 2, 3)
    value = torch.randn(2, int(keys.sum()), 4, 8, generator=rng())
    # A tenth of a pixel away from where the derivative jumps.
    pixels = torch.rand(*shape, 2, generator=rng(1)) * (sizes.flip(1).view(1, 1, 1, 2, 1, 2) + 2) - 1.5
    pixels = pixels.floor() + 0.1 + 0.8 * (pixels - pixels.floor())
    locations = (pixels + 0.5) / sizes.flip(1).view(1, 1, 1, 2, 1, 2)
    weights = torch.rand(shape, generator=rng(2))
    return [each.to(dtype) for each in (value, locations, weights)], sizes, keys.cumsum(0) - keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(dtype):
    leaves, sizes, starts = arguments(dtype)
    leaves = [each.requires_grad_() for each in leaves]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    value, locations, weights = leaves
    found = MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    wanted = multi_scale_deformable_attn_pytorch(exact[0], sizes, exact[1], exact[2])
    assert_close("out", wanted, found, 1e-5 if dtype == torch.float32 else 1e-12)
    grad = torch.randn(found.shape, generator=rng(3)).to(dtype)
    for mine, right in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert_close("gradient", right, mine, 1e-5 if dtype == torch.float32 else 1e-11)


def test_levels_as_int32_and_values_in_float16():
    (value, locations, weights), sizes, starts = arguments()
    found = MultiScaleDeformableAttnFunction.apply(value.half(), sizes.int(), starts.int(), locations, weights, 64)
    assert found.dtype == torch.float16
    wanted = multi_scale_deformable_attn_pytorch(value.double(), sizes, locations.double(), weights.double())
    assert_close("out", wanted, found, 5e-3)


def test_autocast_leaves_the_type_of_the_values():
    (value, locations, weights), sizes, starts = arguments()
    wanted = MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    assert torch.equal(found, wanted)
