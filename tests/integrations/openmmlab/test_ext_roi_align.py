"""mmcv's pooling of regions, through mmcv's own functions, against definitions in float64."""

import mmcv.ops
import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, rng

from .image_definitions import definitions

SIZE, SCALE = (2, 3), 0.5
ROIS = torch.tensor(
    [[0, 2.3, 1.1, 9.4, 8.7], [1, -3.2, -4.1, 4.9, 3.3], [1, 8.2, 7.9, 19.7, 17.3], [0, 40.0, 40.0, 52.0, 49.0]]
)
ROTATED = torch.tensor([[0, 5.3, 6.1, 7.4, 4.7, 0.4], [1, 0.7, 1.1, 6.0, 9.0, -1.3], [1, 11.2, 10.9, 8.7, 3.3, 2.9]])
BEZIERS = torch.cat((torch.tensor([[0.0], [1.0]]), torch.rand(2, 16, generator=rng(2)) * 14 - 1), 1)


def maps(channels=4):
    return torch.randn(2, channels, 6, 7, generator=rng())


CASES = {
    f"{name}-{how}": (name, how)
    for name, settings in {
        "roi_align": [(0, "avg", True), (2, "avg", False), (0, "max", False), (2, "max", True)],
        "roi_align_rotated": [(0, True, True), (2, False, False)],
        "bezier_align": [(0, True), (2, False)],
        "roi_pool": [()],
        "prroi_pool": [()],
        "riroi_align_rotated": [(2, 4, True), (0, 2, False)],
        "deform_roi_pool": [(0, 0.3), (2, 0.1)],
    }.items()
    for how in settings
}


def call(name, how, x, offset):
    if name == "roi_align":
        return mmcv.ops.roi_align(x, ROIS, SIZE, SCALE, *how)
    if name == "roi_align_rotated":
        return mmcv.ops.roi_align_rotated(x, ROTATED, SIZE, SCALE, *how)
    if name == "bezier_align":
        return mmcv.ops.bezier_align(x, BEZIERS, SIZE, SCALE, *how)
    if name == "roi_pool":
        return mmcv.ops.roi_pool(x, ROIS, SIZE, SCALE)
    if name == "prroi_pool":
        return mmcv.ops.prroi_pool(x, ROIS, SIZE, SCALE)
    if name == "riroi_align_rotated":
        return mmcv.ops.RiRoIAlignRotated(SIZE, SCALE, *how)(x, ROTATED)
    return mmcv.ops.deform_roi_pool(x, ROIS, offset, SIZE, SCALE, *how)


def defined(name, how, x, offset):
    rois, rotated, beziers = (each.double() for each in (ROIS, ROTATED, BEZIERS))
    if name == "roi_align":
        samples, mode, aligned = how
        return definitions.roi_align(x, rois, SIZE, SCALE, samples, aligned, largest=mode == "max")
    if name == "roi_align_rotated":
        return definitions.roi_align_rotated(x, rotated, SIZE, SCALE, *how)
    if name == "bezier_align":
        return definitions.bezier_align(x, beziers, SIZE, SCALE, *how)
    if name in ("roi_pool", "prroi_pool"):
        return getattr(definitions, name)(x, rois, SIZE, SCALE)
    if name == "riroi_align_rotated":
        return definitions.riroi_align_rotated(x, rotated, SIZE, SCALE, *how)
    return definitions.deform_roi_pool(x, rois, offset, SIZE, SCALE, *how)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    name, how = CASES[case]
    offset = torch.randn(len(ROIS), 2, *SIZE, generator=rng(3)) if name == "deform_roi_pool" else None
    leaves = [each.requires_grad_() for each in (maps(), offset) if each is not None]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    found = call(name, how, *(leaves if offset is not None else (*leaves, None)))
    wanted = defined(name, how, *(exact if offset is not None else (*exact, None)))
    assert_close("out", wanted, found, 1e-5)
    grad = torch.randn(found.shape, generator=rng(4))
    for mine, right in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert_close("gradient", right, mine, 1e-5)


def test_precise_pooling_moves_its_boxes():
    x, rois = maps().requires_grad_(), ROIS.clone().requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (x, rois)]
    grad = torch.randn(len(ROIS), 4, *SIZE, generator=rng(4))
    mmcv.ops.prroi_pool(x, rois, SIZE, SCALE).backward(grad)
    definitions.prroi_pool(*exact, SIZE, SCALE).backward(grad.double())
    assert_close("grad_rois", exact[1].grad[:, 1:], rois.grad[:, 1:], 1e-4)
    assert not rois.grad[:, 0].any()


@pytest.mark.parametrize("pool_size", [1, 4])
def test_border_align(pool_size):
    x = maps(8).requires_grad_()
    corner = torch.rand(2, 42, 2, generator=rng(1)) * 7 - 2
    boxes = torch.cat((corner, corner + torch.rand(2, 42, 2, generator=rng(2)) * 5), 2)
    exact = x.detach().double().requires_grad_()
    found = mmcv.ops.border_align(x, boxes, pool_size)
    wanted = definitions.border_align(exact, boxes.double(), pool_size)
    assert_close("out", wanted, found, 1e-5)
    grad = torch.randn(found.shape, generator=rng(4))
    found.backward(grad)
    wanted.backward(grad.double())
    assert_close("gradient", exact.grad, x.grad, 1e-5)


def test_no_boxes():
    x = maps().requires_grad_()
    rois, rotated, beziers = x.new_zeros(0, 5), x.new_zeros(0, 6), x.new_zeros(0, 17)
    for out in (
        mmcv.ops.roi_align(x, rois, SIZE),
        mmcv.ops.roi_align(x, rois, SIZE, 1.0, 0, "max"),
        mmcv.ops.roi_pool(x, rois, SIZE),
        mmcv.ops.prroi_pool(x, rois, SIZE),
        mmcv.ops.deform_roi_pool(x, rois, None, SIZE),
        mmcv.ops.roi_align_rotated(x, rotated, SIZE, 1.0),
        mmcv.ops.bezier_align(x, beziers, SIZE),
    ):
        assert out.shape == (0, 4, *SIZE)
        (by_x,) = torch.autograd.grad(out.sum(), x)
        assert not by_x.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    x = maps().to(dtype).requires_grad_()
    found = mmcv.ops.RoIAlign(SIZE, SCALE, 2)(x, ROIS.to(dtype))
    wanted = definitions.roi_align(x.detach().double(), ROIS.to(dtype).double(), SIZE, SCALE, 2, True)
    assert found.dtype == dtype
    assert_close("out", wanted, found, 1e-3 if dtype == torch.float16 else 1e-12)
    found.sum().backward()
    assert x.grad.dtype == dtype


def test_the_box_head_of_a_detector_pools_by_these():
    extractor = pytest.importorskip("mmdet.models.roi_heads.roi_extractors").SingleRoIExtractor(
        roi_layer={"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}, out_channels=4, featmap_strides=[4, 8]
    )
    levels = [torch.randn(2, 4, 32, 32, generator=rng()), torch.randn(2, 4, 16, 16, generator=rng(1))]
    rois = torch.tensor([[0, 3.0, 4.0, 60.0, 50.0], [1, 0.0, 0.0, 120.0, 125.0]])
    out = extractor(levels, rois)
    assert out.shape == (2, 4, 7, 7)
    wanted = definitions.roi_align(levels[0].double(), rois[:1].double(), (7, 7), 0.25, 0, True)
    assert_close("out", wanted, out[:1], 1e-5)
