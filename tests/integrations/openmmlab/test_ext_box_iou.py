"""``mmcv.ops`` on our overlaps: through mmcv's own functions, against definitions and mmcv's own Python."""

import math

import pytest
import torch

ops = pytest.importorskip("mmcv.ops")

from mmcv.ops.bbox import _bbox_overlaps_cpu  # noqa: E402
from mmcv.ops.diff_iou_rotated import diff_iou_rotated_2d, diff_iou_rotated_3d  # noqa: E402


def turned(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    return (boxes * torch.tensor([4, 4, 3, 2, 6]) + torch.tensor([0, 0, 0.5, 0.5, -3])).to(dtype)


def corners_of(box):
    x, y, w, h, angle = (float(number) for number in box)
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        (x + a * w * cos - b * h * sin, y + a * w * sin + b * h * cos)
        for a, b in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))
    ]


def shared_area(first, second):
    """Of two convex polygons, counter-clockwise, one cut by the lines of the other."""
    polygon = first
    for (ax, ay), (bx, by) in zip(second, second[1:] + second[:1], strict=True):
        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            sides = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in (p, q)]
            if sides[0] >= 0:
                kept.append(p)
            if sides[0] * sides[1] < 0:
                t = sides[0] / (sides[0] - sides[1])
                kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = kept
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in pairs)) / 2


def exact(a, b, mode):
    found = torch.zeros(len(a), len(b), dtype=torch.float64)
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            shared, own = shared_area(corners_of(first), corners_of(second)), float(first[2] * first[3])
            found[i, j] = shared / (own + float(second[2] * second[3]) - shared if mode == "iou" else own)
    return found


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_bbox_overlaps_are_those_of_its_own_python(offset, mode):
    boxes = turned(30)[:, :4].float()
    boxes[:, 2:] += boxes[:, :2]
    for aligned in (False, True):
        found = ops.bbox_overlaps(boxes, boxes.flip(0), mode, aligned, offset)
        assert torch.equal(found, _bbox_overlaps_cpu(boxes, boxes.flip(0), mode, aligned, offset))


def test_bbox_overlaps_of_its_own_example():
    a = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [32, 32, 38, 42]])
    b = torch.tensor([[0.0, 0, 10, 20], [0, 10, 10, 19], [10, 10, 20, 20]])
    assert ops.bbox_overlaps(a, b).tolist() == [[0.5, 0, 0], [0, 0, 1], [0, 0, 0]]
    none = torch.tensor([])
    assert ops.bbox_overlaps(none, a).shape == (0, 3)
    assert ops.bbox_overlaps(a, none).shape == (3, 0)
    assert ops.bbox_overlaps(a, b.double(), aligned=True).tolist() == [0.5, 0, 0]
    assert ops.bbox_overlaps(a.long(), a.long()).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_box_iou_rotated(dtype, clockwise, mode):
    a, b = turned(9, 0, dtype), turned(11, 1, dtype)
    flip = torch.tensor([1, 1, 1, 1, 1 if clockwise else -1])
    wanted = exact(a * flip, b * flip, mode)
    found = ops.box_iou_rotated(a, b, mode, clockwise=clockwise)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    paired = ops.box_iou_rotated(a, b[:9], mode, True, clockwise)
    assert torch.equal(paired, found[:, :9].diagonal())
    assert ops.box_iou_rotated(a[:0], b).shape == (0, 11)
    assert not ops.box_iou_rotated(a.requires_grad_(), b).requires_grad


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_box_iou_quadri(mode):
    a, b = turned(6), turned(7, 1)
    quads = [torch.tensor([[x for corner in corners_of(box) for x in corner] for box in each]) for each in (a, b)]
    found = ops.box_iou_quadri(*quads, mode)
    torch.testing.assert_close(found.double(), exact(a, b, mode), rtol=0, atol=1e-6)
    paired = ops.box_iou_quadri(quads[0], quads[1][:6], mode, aligned=True)
    assert torch.equal(paired, found[:, :6].diagonal())


def test_points_in_polygons():
    square = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2], [5, 5, 7, 7, 5, 9, 3, 7]])
    points = torch.tensor([[1.0, 1], [3, 1], [5, 7], [4.5, 5.2], [-1, 1]])
    found = ops.points_in_polygons(points, square)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, 0], [0, 0], [0, 1], [0, 0], [0, 0]]


def test_diff_iou_rotated_is_the_iou():
    a, b = turned(40, dtype=torch.float32), turned(40, 1, torch.float32)
    found = diff_iou_rotated_2d(a[None], b[None])[0]
    torch.testing.assert_close(found, ops.box_iou_rotated(a, b, aligned=True), rtol=1e-4, atol=1e-5)
    assert (found > 0.05).sum() > 10


def test_diff_iou_rotated_has_the_right_gradients():
    a, b = turned(30), turned(30, 1)
    near = ops.box_iou_rotated(a, b, aligned=True) > 0.05
    a, b = a[near][None], b[near][None]
    leaves = [each.clone().requires_grad_() for each in (a, b)]
    found = torch.autograd.grad(diff_iou_rotated_2d(*leaves).sum(), leaves)
    step = 1e-6
    for which, gradient in enumerate(found):
        for column in range(5):
            moved = []
            for sign in (1, -1):
                boxes = [a.clone(), b.clone()]
                boxes[which][..., column] += sign * step
                moved.append(ops.box_iou_rotated(boxes[0][0], boxes[1][0], aligned=True))
            slope = (moved[0] - moved[1]) / (2 * step)
            # mmcv adds 1e-8 to what it divides by, so that its crossings are a little off.
            torch.testing.assert_close(gradient[0, :, column], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_diff_iou_rotated_of_the_same_boxes(noise):
    boxes = turned(200)[None]
    other = boxes + noise * torch.randn_like(boxes)
    found = diff_iou_rotated_2d(boxes.requires_grad_(), other)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=2e-3)
    found.sum().backward()
    assert boxes.grad.isfinite().all()


def test_diff_iou_rotated_of_boxes_that_are_the_same_but_for_rounding():
    """mmcv finds up to a dozen vertices then, some of them beside the boxes: nothing breaks, that is all."""
    boxes = turned(200, dtype=torch.float32)[None]
    found = diff_iou_rotated_2d(boxes.requires_grad_(), boxes.detach() + 1e-7 * torch.randn_like(boxes))
    found.sum().backward()
    assert found.isfinite().all()
    assert boxes.grad.isfinite().all()
    assert found.median().item() == pytest.approx(1, abs=1e-4)


def test_diff_iou_rotated_in_3d():
    box = torch.tensor([[[0.5, 0.5, 0.5, 1, 1, 1, 0]] * 5])
    other = torch.tensor([[
        [0.5, 0.5, 0.5, 1, 1, 1, 0], [0.5, 0.5, 0.5, 1, 1, 2, math.pi], [0.5, 0.5, 0.5, 1, 1, 1, math.pi / 4],
        [1, 1, 1, 1, 1, 1, 0], [-1.5, -1.5, -1.5, 2.5, 2.5, 2.5, 0],
    ]])  # fmt: skip
    found = diff_iou_rotated_3d(box, other)
    octagon = 2 * math.sqrt(2) - 2
    wanted = torch.tensor([[1, 0.5, octagon / (2 - octagon), 1 / 15, 0]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
