"""``mmcv.ops`` on our 3-D boxes: through mmcv's own functions, against definitions.

mmcv's ``points_in_boxes_part`` and ``points_in_boxes_all`` ask for a GPU before they call their op: it is called.
"""

import math

import pytest
import torch

ops = pytest.importorskip("mmcv.ops")

from mmcv.ops import iou3d  # noqa: E402
from mmcv.ops import points_in_boxes as points_module  # noqa: E402


def boxes_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 7, generator=generator)
    return boxes * torch.tensor([8, 8, 2, 4, 3, 2, 6]) + torch.tensor([0, 0, 0, 0.5, 0.5, 0.5, -3])


def seen_from_above(boxes):
    return boxes[:, [0, 1, 3, 4, 6]]


def greedy(ious, threshold):
    left, kept = list(range(len(ious))), []
    while left:
        best, *left = left
        kept.append(best)
        left = [row for row in left if not ious[best, row] > threshold]
    return kept


def test_overlaps_seen_from_above():
    a, b = boxes_of(20), boxes_of(30, 1)
    found = ops.boxes_overlap_bev(a, b)
    ious = ops.box_iou_rotated(seen_from_above(a).double(), seen_from_above(b).double())
    areas = [(each[:, 3] * each[:, 4]).double() for each in (a, b)]
    wanted = ious * (areas[0][:, None] + areas[1]) / (1 + ious)
    assert (found > 0).float().mean() > 0.05
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert ops.boxes_overlap_bev(a[:0], b).shape == (0, 30)


def test_iou_in_3d():
    a = torch.tensor([[1.0, 1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2, math.pi / 2], [5, 5, 5, 2, 1, 2, 0]])
    b = torch.tensor([[1.0, 1, 2, 2, 2, 2, 0], [2, 1, 1, 2, 2, 2, 0], [5, 5, 5, 1, 2, 2, math.pi / 2]])
    wanted = torch.tensor([[1 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 0], [0, 0, 1]])
    torch.testing.assert_close(ops.boxes_iou3d(a, b), wanted)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_nms3d(threshold):
    boxes, scores = boxes_of(90), torch.rand(90)
    order = scores.sort(descending=True)[1]
    ordered = seen_from_above(boxes[order])
    kept = ops.nms3d(boxes, scores, threshold)
    assert kept.tolist() == order[greedy(ops.box_iou_rotated(ordered, ordered), threshold)].tolist()
    flat = torch.cat((ordered[:, :2] - ordered[:, 2:4] / 2, ordered[:, :2] + ordered[:, 2:4] / 2), 1)
    kept = ops.nms3d_normal(boxes, scores, threshold)
    assert kept.tolist() == order[greedy(ops.bbox_overlaps(flat, flat), threshold)].tolist()


def test_nms3d_of_no_boxes():
    assert ops.nms3d(boxes_of(0), torch.zeros(0), 0.5).shape == (0,)
    assert ops.nms3d_normal(boxes_of(0), torch.zeros(0), 0.5).shape == (0,)


def test_nms_bev():
    """mmcv's deprecated functions for x1, y1, x2, y2, angle."""
    boxes, scores = seen_from_above(boxes_of(60)), torch.rand(60)
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2, boxes[:, 4:]), 1)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        kept = iou3d.nms_bev(corners, scores, 0.2, 50, 20)
    order = scores.sort(descending=True)[1][:50]
    ordered = boxes[order]
    assert kept.tolist() == order[greedy(ops.box_iou_rotated(ordered, ordered), 0.2)[:20]].tolist()


def inside(points, boxes):
    """``(M, T)`` in float64."""
    away = points.double()[:, None] - boxes.double()[None, :, :3]
    cos, sin = boxes[:, 6].double().cos(), boxes[:, 6].double().sin()
    along, across = away[..., 0] * cos + away[..., 1] * sin, away[..., 1] * cos - away[..., 0] * sin
    return (
        (along.abs() < boxes[:, 3] / 2) & (across.abs() < boxes[:, 4] / 2)
        & (away[..., 2] >= 0) & (away[..., 2] <= boxes[:, 5])
    )  # fmt: skip


def test_points_in_boxes():
    points = torch.rand(2, 400, 3) * torch.tensor([8, 8, 4])
    boxes = torch.stack((boxes_of(10), boxes_of(10, 1)))
    wanted = torch.stack([inside(*each) for each in zip(points, boxes, strict=True)])
    assert wanted.float().mean() > 0.02
    found = ops.points_in_boxes_cpu(points, boxes)
    assert found.dtype == torch.int32
    assert torch.equal(found, wanted.int())
    every = torch.zeros(2, 400, 10, dtype=torch.int32)
    points_module.ext_module.points_in_boxes_all_forward(boxes, points, every)
    assert torch.equal(every, wanted.int())
    first = torch.full((2, 400), -1, dtype=torch.int32)
    points_module.ext_module.points_in_boxes_part_forward(boxes, points, first)
    hit, box = wanted.max(2)
    assert torch.equal(first, torch.where(hit, box, -1).int())


def test_points_in_boxes_of_its_own_test():
    boxes = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.3], [-10.0, 23.0, 16.0, 10, 20, 20, 0.5]]])
    points = torch.tensor([[
        [1, 2, 3.3], [1.2, 2.5, 3.0], [0.8, 2.1, 3.5], [1.6, 2.6, 3.6], [0.8, 1.2, 3.9], [-9.2, 21.0, 18.2],
        [3.8, 7.9, 6.3], [4.7, 3.5, -12.2], [3.8, 7.6, -2], [-10.6, -12.9, -20], [-16, -18, 9], [-21.3, -52, -5],
        [0, 0, 0], [6, 7, 8], [-2, -3, -4],
    ]])  # fmt: skip
    found = ops.points_in_boxes_cpu(points, boxes)
    assert found[0].tolist() == [[1, 0]] * 5 + [[0, 1]] + [[0, 0]] * 9
