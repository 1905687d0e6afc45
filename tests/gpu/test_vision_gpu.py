"""Image ops on a GPU give what they give on a CPU, twice the same."""

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, rng
from kernelgraft_core.vision.bezier_align import bezier_align
from kernelgraft_core.vision.border_align import border_align, border_align_backward
from kernelgraft_core.vision.carafe import carafe
from kernelgraft_core.vision.correlation import Patches, correlation
from kernelgraft_core.vision.deform_attention import deform_attention
from kernelgraft_core.vision.deform_conv import Window, deform_conv2d
from kernelgraft_core.vision.deform_roi_pool import deform_roi_pool
from kernelgraft_core.vision.focal_loss import sigmoid_focal_loss
from kernelgraft_core.vision.precise_roi_pool import prroi_pool
from kernelgraft_core.vision.psa_mask import psa_mask
from kernelgraft_core.vision.resample import Rates, upfirdn2d
from kernelgraft_core.vision.roi_align import roi_align, roi_align_max, roi_align_max_backward
from kernelgraft_core.vision.roi_align_rotated import riroi_align_rotated, roi_align_rotated
from kernelgraft_core.vision.roi_pool import roi_pool, roi_pool_backward
from kernelgraft_core.vision.rotated_feature_align import rotated_feature_align
from kernelgraft_core.vision.temporal_shift import temporal_shift

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


X = randn(2, 8, 20, 24)
CORNERS = torch.rand(30, 2, generator=rng(1)) * 30 - 4
IMAGES = torch.arange(30).unsqueeze(1) % 2
ROIS = torch.cat((IMAGES, CORNERS, CORNERS + torch.rand(30, 2, generator=rng(2)) * 25), 1)
ROTATED = torch.cat((IMAGES, CORNERS, torch.rand(30, 2, generator=rng(3)) * 20, randn(30, 1, seed=4)), 1)
BEZIERS = torch.cat((IMAGES, torch.rand(30, 16, generator=rng(5)) * 30), 1)
SIZES = torch.tensor([[12, 10], [6, 5]])
CASES = {
    "roi_align": (lambda x, r: roi_align(x, r, (3, 4), 0.7, 0), (X, ROIS)),
    "roi_align_rotated": (lambda x, r: roi_align_rotated(x, r, (3, 4), 0.7, 0), (X, ROTATED)),
    "riroi_align_rotated": (lambda x, r: riroi_align_rotated(x, r, (3, 4), 0.7, 2, 4), (X, ROTATED)),
    "bezier_align": (lambda x, r: bezier_align(x, r, (3, 4), 0.7, 0), (X, BEZIERS)),
    "prroi_pool": (lambda x, r: prroi_pool(x, r, (3, 4), 0.7), (X, ROIS)),
    "deform_roi_pool": (
        lambda x, r, o: deform_roi_pool(x, r, o, (3, 4), 0.7, 2),
        (X, ROIS, randn(30, 2, 3, 4, seed=6)),
    ),
    "rotated_feature_align": (
        lambda x, b: rotated_feature_align(x, b, 0.5, 5),
        (X, torch.rand(2, 20, 24, 5, generator=rng(7)) * 30),
    ),
    "deform_conv2d": (
        lambda x, o, w, b, m: deform_conv2d(x, o, w, b, m, Window(padding=(1, 1), groups=2, deform_groups=4)),
        (
            X,
            2 * randn(2, 72, 20, 24, seed=8),
            randn(6, 4, 3, 3, seed=9),
            randn(6, seed=10),
            randn(2, 36, 20, 24, seed=11),
        ),
    ),
    "deform_attention": (
        lambda v, s, f, p, w: deform_attention(v, s, f, p, w),
        (
            randn(2, 150, 4, 8),
            SIZES,
            torch.tensor([0, 120]),
            torch.rand(2, 40, 4, 2, 3, 2, generator=rng(12)) * 1.4 - 0.2,
            randn(2, 40, 4, 2, 3, seed=13),
        ),
    ),
    "carafe": (lambda x, m: carafe(x, m, 3, 2, 2), (X, randn(2, 18, 40, 48, seed=14))),
    "psa_mask": (lambda m: psa_mask(m, (5, 7)), (randn(2, 35, 6, 5),)),
    "correlation": (lambda a, b: correlation(a, b, Patches((3, 3), (5, 5), padding=(1, 1))), (X, X + 1)),
    "temporal_shift": (
        lambda x, s: temporal_shift(x, s),
        (randn(2, 5, 4, 6), torch.tensor([[1, -2], [0, 3]])),
    ),
    "sigmoid_focal_loss": (lambda x, t: sigmoid_focal_loss(x, t), (randn(50, 4), torch.arange(50) % 5)),
    "upfirdn2d": (lambda x: upfirdn2d(x, torch.ones(3, 2, device=x.device), Rates((2, 1), (1, 2))), (X,)),
}
FIXED = {"roi_align", "roi_align_rotated", "riroi_align_rotated", "bezier_align", "rotated_feature_align"}


def computed(name, device, dtype):
    function, args = CASES[name]
    args = [each.to(device, dtype if each.is_floating_point() else None) for each in args]
    leaves = [each for i, each in enumerate(args) if each.is_floating_point() and (i == 0 or name not in FIXED)]
    if name == "deform_roi_pool":
        leaves = [args[0], args[2]]
    for each in leaves:
        each.requires_grad_()
    out = function(*args)
    grad = randn(*out.shape, seed=20).to(device, out.dtype)
    return [each.detach() for each in (out, *torch.autograd.grad(out, leaves, grad))]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_cpu_and_reproducible(name):
    wanted = computed(name, "cpu", torch.double)
    for right, found in zip(wanted, computed(name, "cuda", torch.double), strict=True):
        assert_close(name, right, found, 1e-10)
    first, second = computed(name, "cuda", torch.float), computed(name, "cuda", torch.float)
    for right, one, two in zip(wanted, first, second, strict=True):
        assert_close(name, right, one, 2e-2)  # a derivative that jumps between pixels may be taken on the other side
        assert torch.equal(one, two)


def test_the_largest_is_the_same():
    x, rois, boxes = X.cuda(), ROIS.cuda(), ROIS[:, 1:].view(2, 15, 4)
    cpu, gpu = roi_align_max(X, ROIS, (3, 4), 0.7, 2), roi_align_max(x, rois, (3, 4), 0.7, 2)
    assert_close("roi_align_max", cpu[0], gpu[0], 1e-5)
    grad = randn(30, 8, 3, 4, seed=1)
    assert_close(
        "gradient",
        roi_align_max_backward(grad, ROIS, cpu[1], cpu[2], X.shape),
        roi_align_max_backward(grad.cuda(), rois, cpu[1].cuda(), cpu[2].cuda(), X.shape),
        1e-5,
    )
    largest, pixels = roi_pool(X, ROIS, (3, 4), 0.7)
    assert_close("roi_pool", largest, roi_pool(x, rois, (3, 4), 0.7)[0], 0)
    by_gpu = roi_pool_backward(grad.cuda(), rois, pixels.cuda(), X.shape)
    assert_close("gradient", roi_pool_backward(grad, ROIS, pixels, X.shape), by_gpu, 1e-6)
    out, number = border_align(X, boxes, 5)
    assert_close("border_align", out, border_align(x, boxes.cuda(), 5)[0], 1e-5)
    grad = randn(*out.shape, seed=1)
    by_gpu = border_align_backward(grad.cuda(), boxes.cuda(), number.cuda(), X.shape, 5)
    assert_close("gradient", border_align_backward(grad, boxes, number, X.shape, 5), by_gpu, 1e-5)
