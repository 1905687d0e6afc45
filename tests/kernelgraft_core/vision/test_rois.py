"""Pooling of regions of interest against sample-by-sample definitions."""

import math

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, rng
from kernelgraft_core.vision.bezier_align import bezier_align, bezier_align_backward
from kernelgraft_core.vision.border_align import border_align, border_align_backward
from kernelgraft_core.vision.deform_roi_pool import deform_roi_pool
from kernelgraft_core.vision.precise_roi_pool import prroi_pool, prroi_pool_backward
from kernelgraft_core.vision.roi_align import (
    roi_align,
    roi_align_backward,
    roi_align_max,
    roi_align_max_backward,
)
from kernelgraft_core.vision.roi_align_rotated import (
    riroi_align_rotated,
    riroi_align_rotated_backward,
    roi_align_rotated,
    roi_align_rotated_backward,
)
from kernelgraft_core.vision.roi_pool import roi_pool, roi_pool_backward

from . import definitions

SIZE, SCALE = (2, 3), 0.5
# Inside, across every edge, outside, larger than the image, thin, on the last image.
ROIS = [
    [0, 2.3, 1.1, 9.4, 8.7],
    [1, -3.2, -4.1, 4.9, 3.3],
    [1, 8.2, 7.9, 19.7, 17.3],
    [0, 40.0, 40.0, 52.0, 49.0],
    [1, -21.0, -19.0, 33.0, 37.0],
    [0, 3.1, 2.2, 3.4, 11.9],
]
ROTATED = [
    [0, 5.3, 6.1, 7.4, 4.7, 0.4],
    [1, 0.7, 1.1, 6.0, 9.0, -1.3],
    [1, 11.2, 10.9, 8.7, 3.3, 2.9],
    [0, 60.0, 60.0, 12.0, 9.0, 0.1],
    [1, 6.0, 6.0, 31.0, 27.0, 7.1],
]


@pytest.fixture
def maps():
    return torch.randn(2, 4, 6, 7, dtype=torch.double, generator=rng())


def tensor(rows):
    return torch.tensor(rows, dtype=torch.double)


def agrees(found, wanted, x, backward, tolerance=1e-12):
    """Value, and the gradient in ``x`` by autograd and by the function of its own."""
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    grad = torch.randn(wanted.shape, dtype=torch.double, generator=rng(7))
    (by_definition,) = torch.autograd.grad(wanted, x, grad)
    torch.testing.assert_close(backward(grad), by_definition, rtol=tolerance, atol=tolerance)
    if found.requires_grad:
        (by_autograd,) = torch.autograd.grad(found, x, grad)
        torch.testing.assert_close(by_autograd, by_definition, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2, 3])
def test_roi_align_is_the_mean_of_its_samples(maps, samples, aligned):
    x, rois = maps.requires_grad_(), tensor(ROIS)
    how = (SCALE, samples, aligned)
    found = roi_align(x, rois, SIZE, *how)
    assert found.requires_grad
    agrees(found, definitions.roi_align(x, rois, SIZE, *how), x, lambda g: roi_align_backward(g, rois, x.shape, *how))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_max_is_the_largest_of_its_samples(maps, samples, aligned):
    x, rois = maps.requires_grad_(), tensor(ROIS)
    found, y, z = roi_align_max(x, rois, SIZE, SCALE, samples, aligned)
    wanted = definitions.roi_align(x, rois, SIZE, SCALE, samples, aligned, largest=True)
    agrees(found, wanted, x, lambda g: roi_align_max_backward(g, rois, y, z, x.shape))


def test_roi_align_max_takes_the_first_of_equal_samples():
    x = torch.zeros(1, 1, 4, 4)
    _, y, z = roi_align_max(x, torch.tensor([[0.0, 0, 0, 4, 4]]), (1, 1), 1.0, 2, True)
    assert (y.item(), z.item()) == (0.5, 0.5)


def test_roi_align_max_of_a_box_without_samples_is_the_smallest_number_and_has_no_gradient():
    x, rois = torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 2, 2, 1, 1]])
    out, y, z = roi_align_max(x, rois, (1, 1), 1.0, 0, True)
    assert (out.item(), y.item(), z.item()) == (torch.finfo(torch.float32).min, -1, -1)
    assert not roi_align_max_backward(torch.ones(1, 1, 1, 1), rois, y, z, x.shape).any()


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
def test_rotated_roi_align_turns_its_samples(maps, samples, aligned, clockwise):
    x, rois = maps.requires_grad_(), tensor(ROTATED)
    how = (SCALE, samples, aligned, clockwise)
    wanted = definitions.roi_align_rotated(x, rois, SIZE, *how)
    agrees(
        roi_align_rotated(x, rois, SIZE, *how), wanted, x, lambda g: roi_align_rotated_backward(g, rois, x.shape, *how)
    )


@pytest.mark.parametrize("clockwise", [True, False])
def test_rotation_invariant_roi_align_turns_the_channels_too(maps, clockwise):
    x, rois = maps.requires_grad_(), tensor(ROTATED)
    how = (SCALE, 2, 4, clockwise)
    wanted = definitions.riroi_align_rotated(x, rois, SIZE, *how)
    agrees(
        riroi_align_rotated(x, rois, SIZE, *how),
        wanted,
        x,
        lambda g: riroi_align_rotated_backward(g, rois, x.shape, *how),
    )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
def test_bezier_align_lies_between_its_curves(maps, samples, aligned):
    points = torch.rand(3, 16, dtype=torch.double, generator=rng(2)) * 14 - 1
    x, beziers = maps.requires_grad_(), torch.cat((tensor([[0], [1], [1]]), points), 1)
    how = (SCALE, samples, aligned)
    agrees(
        bezier_align(x, beziers, SIZE, *how),
        definitions.bezier_align(x, beziers, SIZE, *how),
        x,
        lambda g: bezier_align_backward(g, beziers, x.shape, *how),
    )


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("moved", [True, False])
def test_deformable_roi_pooling_moves_its_bins(maps, samples, moved):
    x, rois = maps.requires_grad_(), tensor(ROIS)
    offset = torch.randn(len(rois), 2, *SIZE, dtype=torch.double, generator=rng(3)).requires_grad_() if moved else None
    how = (SIZE, SCALE, samples, 0.3)
    found, wanted = deform_roi_pool(x, rois, offset, *how), definitions.deform_roi_pool(x, rois, offset, *how)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn(found.shape, dtype=torch.double, generator=rng(4))
    leaves = [x, offset] if moved else [x]
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_precise_roi_pooling_is_the_integral_and_has_gradients_of_both(maps):
    x, rois = maps.requires_grad_(), tensor(ROIS).requires_grad_()
    found, wanted = prroi_pool(x, rois, SIZE, SCALE), definitions.prroi_pool(x, rois, SIZE, SCALE)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    grad = torch.randn(found.shape, dtype=torch.double, generator=rng(4))
    ours, theirs = (torch.autograd.grad(out, (x, rois), grad) for out in (found, wanted))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours[1][:, 1:], theirs[1][:, 1:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prroi_pool_backward(grad, rois.detach(), x.shape, SCALE), theirs[0])


def test_roi_pool_is_the_largest_pixel(maps):
    x, rois = maps.requires_grad_(), tensor([*ROIS, [0, 5.0, 5.0, 2.0, 2.0]])
    found, pixels = roi_pool(x, rois, SIZE, SCALE)
    assert pixels.dtype == torch.int32
    wanted = definitions.roi_pool(x, rois, SIZE, SCALE)
    agrees(found, wanted, x, lambda g: roi_pool_backward(g, rois, pixels, x.shape))
    there = pixels >= 0
    assert not found[~there].any()
    images = rois[:, 0].long().view(-1, 1, 1, 1).expand_as(pixels)
    channels = torch.arange(4).view(1, -1, 1, 1).expand_as(pixels)
    picked = x.detach().flatten(2)[images[there], channels[there], pixels[there].long()]
    assert torch.equal(found[there], picked)


@pytest.mark.parametrize("pool_size", [1, 5])
def test_border_align_is_the_largest_sample_of_each_border(pool_size):
    x = torch.randn(2, 8, 5, 6, dtype=torch.double, generator=rng()).requires_grad_()
    corner = torch.rand(2, 7, 2, dtype=torch.double, generator=rng(1)) * 7 - 2
    boxes = torch.cat((corner, corner + torch.rand(2, 7, 2, dtype=torch.double, generator=rng(2)) * 5), 2)
    found, number = border_align(x, boxes, pool_size)
    assert number.dtype == torch.int32
    wanted = definitions.border_align(x, boxes, pool_size)
    agrees(found, wanted, x, lambda g: border_align_backward(g, boxes, number, x.shape, pool_size))


def pools(x, rois, rotated, beziers):
    yield roi_align(x, rois, SIZE)
    yield roi_align_max(x, rois, SIZE)[0]
    yield roi_pool(x, rois, SIZE)[0]
    yield prroi_pool(x, rois, SIZE)
    yield deform_roi_pool(x, rois, None, SIZE)
    yield roi_align_rotated(x, rotated, SIZE)
    yield riroi_align_rotated(x, rotated, SIZE, orientations=2)
    yield bezier_align(x, beziers, SIZE)


@pytest.mark.parametrize("images", [0, 2])
def test_no_boxes_no_results(images):
    x = torch.randn(images, 4, 3, 3, requires_grad=True)
    for out in pools(x, torch.zeros(0, 5), torch.zeros(0, 6), torch.zeros(0, 17)):
        assert out.shape == (0, 4, *SIZE)
        if out.requires_grad:
            (by_x,) = torch.autograd.grad(out.sum(), x)
            assert not by_x.any()
    assert not roi_align_backward(torch.zeros(0, 4, *SIZE), torch.zeros(0, 5), x.shape).any()
    assert not roi_pool_backward(
        torch.zeros(0, 4, *SIZE), torch.zeros(0, 5), torch.zeros(0, 4, *SIZE, dtype=torch.int32), x.shape
    ).any()


def test_boxes_that_are_no_numbers_are_zero():
    x = torch.randn(1, 4, 3, 3)
    for bad in (math.nan, math.inf, -math.inf):
        rois, rotated, beziers = (torch.full((1, n), bad) for n in (5, 6, 17))
        for each in (rois, rotated, beziers):
            each[0, 0] = 0
        for number, out in enumerate(pools(x, rois, rotated, beziers)):
            if number != 1:  # the largest of nothing is the smallest number
                assert not out.any(), number


def test_a_box_far_larger_than_the_image_costs_no_more_than_the_image():
    x, rois = torch.ones(1, 1, 4, 4), torch.tensor([[0.0, -1e6, -1e6, 1e6, 1e6]])
    out = roi_align(x, rois, (1, 1))
    assert 0 < out.item() < 1e-9
    assert 0 < prroi_pool(x, torch.tensor([[0.0, -1e6, -1e6, 1e6, 1e6]]), (1, 1)).item() < 1e-9
    assert roi_pool(x, torch.tensor([[0.0, -1e6, -1e6, 1e6, 1e6]]), (1, 1))[0].item() == 1
    for pool, box in ((roi_align_rotated, [0.0, 0, 0, 1e6, 1e6, 0]), (roi_align_max, [0.0, -1e6, -1e6, 1e6, 1e6])):
        with pytest.raises(ValueError, match="samples, at most"):
            pool(x, torch.tensor([box]), (1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_and_strided_maps(dtype):
    x = torch.randn(2, 6, 7, 4, generator=rng()).to(dtype).permute(0, 3, 1, 2)
    rois = tensor(ROIS).to(dtype)
    wanted = definitions.roi_align(x.double(), rois.double(), SIZE, SCALE, 2, True)
    found = roi_align(x, rois, SIZE, SCALE, 2, True)
    assert found.dtype == dtype
    assert_close("roi_align", wanted, found, {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])
    grad = torch.randn(found.shape, generator=rng(1)).to(dtype)
    by_x = roi_align_backward(grad, rois, x.shape, SCALE, 2, True)
    assert by_x.dtype == dtype


def test_boxes_are_not_differentiated_but_by_precise_pooling():
    x = torch.randn(1, 4, 5, 5, generator=rng()).requires_grad_()
    rois, rotated, beziers = (torch.rand(2, n, generator=rng(1)) * 4 for n in (5, 6, 17))
    for each in (rois, rotated, beziers):
        each[:, 0] = 0
        each.requires_grad_()
    for number, out in enumerate(pools(x, rois, rotated, beziers)):
        if out.requires_grad:
            found = torch.autograd.grad(out.sum(), (rois, rotated, beziers), allow_unused=True)
            assert [each is not None for each in found] == [number == 3, False, False]


def test_one_pixel_images():
    x = torch.full((1, 1, 1, 1), 3.0)
    assert roi_align(x, torch.tensor([[0.0, 0, 0, 1, 1]]), (1, 1), 1.0, 2).item() == 3
    assert roi_pool(x, torch.tensor([[0.0, 0, 0, 0, 0]]), (1, 1))[0].item() == 3


@pytest.mark.parametrize(
    ("rois", "message"),
    [
        (torch.zeros(2, 4), r"\(2, 4\), expected floating point \(R, 5\)"),
        (torch.zeros(2, 5, dtype=torch.int64), "torch.int64"),
        (torch.tensor([[2.0, 0, 0, 1, 1]]), "images 2 to 2, there are 2"),
        (torch.tensor([[-1.0, 0, 0, 1, 1]]), "images -1 to -1"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(rois, message):
    x = torch.zeros(2, 1, 3, 3)
    for pool in (roi_align, roi_align_max, roi_pool, prroi_pool):
        with pytest.raises(ValueError, match=message):
            pool(x, rois, (2, 2))


def test_maps_and_sizes_that_do_not_fit_are_refused():
    rois = torch.zeros(1, 5)
    for x, size in (
        (torch.zeros(1, 3, 3), (1, 1)),
        (torch.zeros(1, 1, 0, 3), (1, 1)),
        (torch.zeros(1, 1, 3, 3), (0, 1)),
    ):
        with pytest.raises(ValueError, match="expected"):
            roi_align(x, rois, size)
    with pytest.raises(ValueError, match="offset is"):
        deform_roi_pool(torch.zeros(1, 1, 3, 3), rois, torch.zeros(1, 2, 2, 2), (1, 1))
    with pytest.raises(ValueError, match="orientations"):
        riroi_align_rotated(torch.zeros(1, 5, 3, 3), torch.zeros(1, 6), (1, 1), orientations=2)
    with pytest.raises(ValueError, match="boxes is"):
        border_align(torch.zeros(1, 4, 3, 3), torch.zeros(2, 1, 4), 2)
