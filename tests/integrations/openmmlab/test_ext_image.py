"""mmcv's other image ops, through mmcv's own functions, against mmcv's Python fallbacks and plain definitions."""

import importlib

import mmcv.ops
import pytest
import torch
import torch.nn.functional as F
from mmcv.utils import ext_loader

from kernelgraft_core.runtime.testing import assert_close, rng

from .image_definitions import definitions

# Functions of the same names hide these modules.
mmcv_bias_act, mmcv_filtered_lrelu, mmcv_upfirdn2d, mmcv_fused = (
    importlib.import_module(f"mmcv.ops.{name}")
    for name in ("bias_act", "filtered_lrelu", "upfirdn2d", "fused_bias_leakyrelu")
)
ext = ext_loader.load_ext("_ext", ["carafe_naive_backward", "carafe_naive_forward", "filtered_lrelu"])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def agrees(function, definition, *leaves, tolerance=1e-5):
    """Both with these leaves: in float32 and in float64."""
    leaves = [each.requires_grad_() for each in leaves]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    found, wanted = function(*leaves), definition(*exact)
    assert_close("out", wanted, found, tolerance)
    grad = randn(*found.shape, seed=9)
    for mine, right in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert_close("gradient", right, mine, tolerance)


@pytest.mark.parametrize(("kernel_size", "groups", "scale"), [(3, 1, 2), (5, 2, 1)])
def test_carafe(kernel_size, groups, scale):
    how = kernel_size, groups, scale
    x, masks = randn(2, 4, 3, 4), randn(2, groups * kernel_size**2, 3 * scale, 4 * scale, seed=1)
    agrees(lambda *a: mmcv.ops.carafe(*a, *how), lambda *a: definitions.carafe(*a, *how), x, masks)


def test_naive_carafe():
    # Its Python refuses gradients off a GPU: the functions themselves.
    x, masks = randn(2, 4, 3, 4), randn(2, 9, 6, 8, seed=1)
    assert_close("out", definitions.carafe(x, masks, 3, 1, 2), mmcv.ops.carafe_naive(x, masks, 3, 1, 2), 1e-6)
    exact = [each.double().requires_grad_() for each in (x, masks)]
    wanted = definitions.carafe(*exact, 3, 1, 2)
    grad = randn(*wanted.shape, seed=2)
    by_x, by_masks = torch.zeros_like(x), torch.zeros_like(masks)
    ext.carafe_naive_backward(grad, x, masks, by_x, by_masks, kernel_size=3, group_size=1, scale_factor=2)
    for right, mine in zip(torch.autograd.grad(wanted, exact, grad.double()), (by_x, by_masks), strict=True):
        assert_close("gradient", right, mine, 1e-5)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
@pytest.mark.parametrize("size", [(3, 5), (9, 7)])
def test_psa_mask(kind, size):
    agrees(
        mmcv.ops.PSAMask(kind, size),
        lambda m: definitions.psa_mask(m, size, kind == "distribute"),
        randn(2, size[0] * size[1], 4, 3),
    )


@pytest.mark.parametrize("how", [(1, 2, 1, 0, 1, 1), (3, 1, 2, 1, 1, 2), (2, 1, 1, 2, 2, 1)])
def test_correlation(how):
    kernel, reach, stride, padding, dilation, patch_dilation = how
    pairs = [(n, n) for n in (kernel, 2 * reach + 1, stride, padding, dilation, patch_dilation)]
    agrees(
        mmcv.ops.Correlation(*how),
        lambda a, b: definitions.correlation(a, b, *pairs),
        randn(2, 3, 6, 5),
        randn(2, 3, 6, 5, seed=1),
    )


def test_temporal_interlacing():
    shift = torch.tensor([[1, 0, -2], [-1, 5, 2]], dtype=torch.int32)

    def moved(x):
        out = 0 * x
        for n in range(2):
            for c in range(6):
                for t in range(3):
                    if 0 <= t + shift[n, c // 2] < 3:
                        out[n, t + shift[n, c // 2], c] = x[n, t, c]
        return out

    agrees(lambda x: mmcv.ops.tin_shift(x, shift), moved, randn(2, 3, 6, 4), tolerance=1e-7)


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_align(points):
    boxes = torch.rand(2, 4, 5, 5, generator=rng(1)) * 40
    agrees(
        lambda x: mmcv.ops.rotated_feature_align(x, boxes, 1 / 8, points),
        lambda x: definitions.rotated_feature_align(x, boxes.double(), 1 / 8, points),
        randn(2, 3, 4, 5),
    )


def test_active_rotated_filter():
    indices = torch.stack([torch.randperm(6, generator=rng(i)) + 1 for i in range(4)], 1).view(2, 1, 3, 4).int()

    def turned(weight):
        out = weight.new_zeros(2, 4, 3, 6)
        for entry in range(6):
            for r in range(4):
                out[:, r, :, int(indices.view(6, 4)[entry, r]) - 1] = weight.flatten(2)[:, :, entry]
        return out.view(8, 6, 1, 3)

    agrees(lambda w: mmcv.ops.active_rotated_filter(w, indices), turned, randn(2, 3, 2, 1, 3))


def test_masked_convolution_is_a_convolution_where_the_mask_is():
    layer, x = mmcv.ops.MaskedConv2d(2, 4, 3, padding=1), randn(1, 2, 6, 5)
    mask = (torch.rand(1, 6, 5, generator=rng(1)) > 0.5).float()
    with torch.no_grad():
        wanted = F.conv2d(x, layer.weight, layer.bias, padding=1) * (mask > 0)
        assert_close("out", wanted, layer(x, mask), 1e-6)
        assert not layer(x, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("mode", ["default", "N"])
def test_batch_norm_over_processes(mode):
    x, weight, bias = randn(3, 4, 2, 5), randn(4, seed=1), randn(4, seed=2)
    running, exact = ([torch.zeros(4, dtype=d), torch.ones(4, dtype=d)] for d in (torch.float, torch.double))
    agrees(
        lambda *a: mmcv.ops.sync_bn.SyncBatchNormFunction.apply(a[0], *running, *a[1:], 0.3, 1e-5, None, 1, mode),
        lambda *a: F.batch_norm(a[0], *exact, *a[1:], True, 0.3, 1e-5),
        x,
        weight,
        bias,
    )
    for right, found in zip(exact, running, strict=True):
        assert_close("running", right, found, 1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_resampling_is_that_of_mmcvs_fallback(shape, flip):
    # The class for GPUs, on a CPU: nothing in it but the op asks for one.
    how = {"up": [2, 1], "down": [1, 3], "padding": [2, 1, 0, 3], "flip_filter": flip, "gain": 1.7}
    kernel = randn(*shape, seed=1)
    agrees(
        lambda x: mmcv_upfirdn2d._upfirdn2d_cuda(**how).apply(x, kernel),
        lambda x: mmcv_upfirdn2d._upfirdn2d_ref(x, kernel, **how),
        randn(2, 3, 5, 6),
    )


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("act", mmcv_bias_act.activation_funcs)
def test_activations_are_those_of_mmcvs_fallback_twice_differentiable(act, clamp):
    how = {"dim": 1, "act": act, "gain": 1.5, "clamp": clamp}
    x, bias = (each.double().requires_grad_() for each in (randn(2, 3, 4), randn(3, seed=1)))
    found = mmcv_bias_act._bias_act_cuda(**how).apply(x, bias)
    wanted = mmcv_bias_act._bias_act_ref(x, bias, **how)
    assert_close("out", wanted, found, 1e-12)
    grad = randn(2, 3, 4, seed=2).double().requires_grad_()
    firsts = [torch.autograd.grad(out, (x, bias), grad, create_graph=True) for out in (found, wanted)]
    if act == "linear" and clamp is not None:
        return  # mmcv keeps nothing that could tell where it was clamped: compiled, it does not either
    for mine, right in zip(*firsts, strict=True):
        assert_close("gradient", right, mine, 1e-12)
    if mmcv_bias_act.activation_funcs[act].has_2nd_grad:
        seconds = [torch.autograd.grad(first[0].square().sum(), (x, grad)) for first in firsts]
        for mine, right in zip(*seconds, strict=True):
            assert_close("second", right, mine, 1e-11)


def test_fused_leaky_relu_is_that_of_mmcvs_fallback():
    function = mmcv_fused.FusedBiasLeakyReLUFunction
    agrees(
        lambda x, b: function.apply(x, b, 0.2, 1.4),
        lambda x, b: mmcv.ops.fused_bias_leakyrelu(x, b, 0.2, 1.4),
        randn(2, 3, 4, 2),
        randn(3, seed=1),
    )


def test_filtered_leaky_relu_is_that_of_mmcvs_fallback():
    how = {"up": 2, "down": 2, "padding": [3, 2, 1, 3], "gain": 1.3, "slope": 0.2, "clamp": 0.9}
    up, down = randn(4, seed=2), randn(3, 3, seed=3)
    x, bias = (each.double().requires_grad_() for each in (randn(2, 3, 5, 4), randn(3, seed=1)))
    wanted = mmcv_filtered_lrelu._filtered_lrelu_ref(x, up, down, bias, **how)
    # In one: what mmcv asks for float16 and float32.
    none = torch.empty(0)
    numbers = (2, 2, 3, 2, 1, 3, 0, 0, 1.3, 0.2, 0.9, False, True)
    found, signs, code = ext.filtered_lrelu(x, up, down, bias, none, *numbers)
    assert code == 0
    assert signs.dtype == torch.uint8
    assert_close("out", wanted, found, 1e-12)
    # In steps, with mmcv's own gradient by signs: what it does for the others.
    with pytest.warns(RuntimeWarning, match="generic fallback"):
        stepwise = mmcv_filtered_lrelu._filtered_lrelu_cuda(**how).apply(x, up, down, bias, None, 0, 0)
    assert_close("out", wanted, stepwise, 1e-12)
    grad = randn(*wanted.shape, seed=4).double()
    with pytest.warns(RuntimeWarning, match="generic fallback"):
        mine = torch.autograd.grad(stepwise, (x, bias), grad)
    # mmcv's reference takes zeros of the margins for negative, which changes no gradient of x.
    for right, each in zip(torch.autograd.grad(wanted, (x, bias), grad), mine, strict=True):
        assert_close("gradient", right, each, 1e-11)
