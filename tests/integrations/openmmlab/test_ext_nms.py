"""``mmcv.ops`` on our suppression: through mmcv's own functions, against their definitions and mmcv's own examples."""

import numpy as np
import pytest
import torch

ops = pytest.importorskip("mmcv.ops")

BOXES = [
    [49.1, 32.4, 51.0, 35.9], [49.3, 32.9, 51.0, 35.3], [49.2, 31.8, 51.0, 35.4], [35.1, 11.5, 39.1, 15.7],
    [35.6, 11.8, 39.3, 14.2], [35.3, 11.5, 39.9, 14.5], [35.2, 11.7, 39.7, 15.7],
]  # fmt: skip
SCORES = [0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3]
TURNED = [[6.0, 3, 8, 7, 0.5], [3, 6, 9, 11, 0.6], [3, 7, 10, 12, 0.3], [1, 4, 13, 7, 0.6]]
TURNED_SCORES = [0.7, 0.8, 0.5, 0.9]


def a_scene(count=120):
    corners = torch.rand(count, 2) * 8
    return torch.cat((corners, corners + torch.rand(count, 2) * 4 + 0.5), 1), torch.rand(count)


def turned_scene(count=100):
    boxes = torch.rand(count, 5) * torch.tensor([8, 8, 4, 3, 6]) + torch.tensor([0, 0, 0.5, 0.5, -3])
    return boxes, torch.rand(count)


def greedy(ious, scores, threshold, labels=None):
    left, kept = scores.sort(descending=True, stable=True)[1].tolist(), []
    while left:
        best, *left = left
        kept.append(best)
        left = [
            row for row in left
            if not ious[best, row] > threshold or (labels is not None and labels[row] != labels[best])
        ]  # fmt: skip
    return kept


def test_nms_of_its_own_example():
    dets, rows = ops.nms(np.float32(BOXES), np.float32(SCORES), 0.6)
    assert isinstance(dets, np.ndarray)
    assert rows.tolist() == [0, 3, 4]
    assert len(dets) == len(rows) == 3


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset):
    boxes, scores = a_scene()
    dets, rows = ops.nms(boxes, scores, 0.3, offset=offset)
    assert rows.tolist() == greedy(ops.bbox_overlaps(boxes, boxes, offset=offset), scores, 0.3)
    assert torch.equal(dets, torch.cat((boxes[rows], scores[rows, None]), 1))
    high = ops.nms(boxes, scores, 0.3, offset, score_threshold=0.5, max_num=7)[1]
    assert torch.equal(high, ops.nms(boxes, scores, 0.3, offset)[1][:7])
    none = ops.nms(boxes[:0], scores[:0], 0.3)
    assert [each.shape for each in none] == [(0, 5), (0,)]


def test_batched_nms_keeps_classes_apart():
    boxes, scores = a_scene()
    classes = torch.randint(3, (len(boxes),))
    ious = ops.bbox_overlaps(boxes, boxes)
    for config in ({"type": "nms", "iou_threshold": 0.3}, {"type": "nms", "iou_threshold": 0.3, "split_thr": 50}):
        dets, rows = ops.batched_nms(boxes, scores, classes, config)
        assert rows.tolist() == greedy(ious, scores, 0.3, classes)
        torch.testing.assert_close(dets[:, -1], scores[rows])


def test_soft_nms_of_its_own_example():
    boxes = np.float32([[4, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]])
    dets, rows = ops.soft_nms(boxes, np.float32([0.9, 0.9, 0.5, 0.5, 0.4, 0]), 0.6, sigma=0.5)
    assert len(rows) == len(dets) == 5
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(dets[:, :4], boxes[rows])


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method):
    boxes, scores = a_scene(40)
    dets, rows = ops.soft_nms(boxes, scores, 0.3, 0.5, 1e-3, method)
    ious, lowered = ops.bbox_overlaps(boxes, boxes), scores.clone()
    for at, row in enumerate(rows.tolist()):
        torch.testing.assert_close(dets[at], torch.cat((boxes[row], lowered[row, None])))
        ratios = ious[row]
        factor = {"naive": (ratios < 0.3).float(), "linear": torch.where(ratios < 0.3, 1, 1 - ratios),
                  "gaussian": (-(ratios**2) / 0.5).exp()}[method]  # fmt: skip
        lowered[rows[at + 1 :]] *= factor[rows[at + 1 :]]
    assert dets[:, -1].diff().le(0).all()


def test_nms_match():
    boxes, scores = a_scene()
    dets = torch.cat((boxes, scores[:, None]), 1)
    groups = ops.nms_match(dets, 0.3)
    assert [group[0].item() for group in groups] == greedy(ops.bbox_overlaps(boxes, boxes), scores, 0.3)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(boxes)))
    assert all(scores[group].diff().le(0).all() for group in groups)
    assert [group.tolist() for group in ops.nms_match(dets.numpy(), 0.3)] == [group.tolist() for group in groups]
    assert ops.nms_match(dets[:0], 0.3) == []


@pytest.mark.parametrize("labels", [None, [1.0, 0, 1, 0]])
def test_nms_rotated_of_its_own_test(labels):
    """Whether there are labels or not: mmcv's own test expects that box 2 is dropped by one of another label."""
    labels = None if labels is None else torch.tensor(labels)
    dets, rows = ops.nms_rotated(torch.tensor(TURNED), torch.tensor(TURNED_SCORES), 0.5, labels)
    assert rows.tolist() == [3, 1, 0]
    assert torch.equal(dets[:, :5], torch.tensor(TURNED)[rows])


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_nms_rotated(dtype, clockwise):
    boxes, scores = (each.to(dtype) for each in turned_scene())
    dets, rows = ops.nms_rotated(boxes, scores, 0.2, clockwise=clockwise)
    assert rows.tolist() == greedy(ops.box_iou_rotated(boxes, boxes, clockwise=clockwise), scores, 0.2)
    assert torch.equal(dets, torch.cat((boxes[rows], scores[rows, None]), 1))
    assert ops.nms_rotated(boxes[:0], scores[:0], 0.2)[1] is None


def test_batched_nms_of_rotated_boxes():
    boxes, scores = turned_scene()
    classes = torch.randint(3, (len(boxes),))
    _, rows = ops.batched_nms(boxes, scores, classes, {"type": "nms_rotated", "iou_threshold": 0.2})
    assert rows.tolist() == greedy(ops.box_iou_rotated(boxes, boxes), scores, 0.2, classes)


def test_at_the_threshold_a_cpu_drops():
    boxes = torch.tensor([[0.0, 0, 2, 1, 0], [0, 0, 1, 1, 0]])
    assert ops.nms_rotated(boxes, torch.tensor([0.9, 0.8]), 0.5)[1].tolist() == [0]
    flat = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    assert ops.nms(flat, torch.tensor([0.9, 0.8]), 0.5)[1].tolist() == [0, 1]


@pytest.mark.parametrize("labels", [False, True])
def test_nms_quadri(labels):
    boxes, scores = turned_scene()
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    corners = [
        (boxes[:, 0] + a * boxes[:, 2] * cos - b * boxes[:, 3] * sin,
         boxes[:, 1] + a * boxes[:, 2] * sin + b * boxes[:, 3] * cos)
        for a, b in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
    ]  # fmt: skip
    quads = torch.stack([x for corner in corners for x in corner], 1)
    classes = torch.randint(2, (len(boxes),)).float() if labels else None
    dets, rows = ops.nms_quadri(quads, scores, 0.2, classes)
    assert rows.tolist() == greedy(ops.box_iou_rotated(boxes, boxes), scores, 0.2)
    assert dets.shape == (len(rows), 9)
    assert rows.tolist() == greedy(ops.box_iou_quadri(quads, quads), scores, 0.2)


def test_boxes_that_want_a_gradient():
    boxes, scores = turned_scene(20)
    wanted = ops.nms_rotated(boxes, scores, 0.2)[1]
    assert torch.equal(ops.nms_rotated(boxes.requires_grad_(), scores.requires_grad_(), 0.2)[1], wanted)
