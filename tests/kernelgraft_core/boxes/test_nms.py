"""Suppression: every backend against the loop that defines it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.boxes import box_iou, nms, nms_match, quad_nms, rotated_iou, rotated_nms, soft_nms
from kernelgraft_core.boxes.nms.ops import NMS_BOXES, NMS_MATCH, NMS_OUTLINES, SOFT_NMS
from kernelgraft_core.boxes.outlines import rotated_outlines

from .box_cases import corners_of, flat_boxes, rotated_boxes

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=["fp64", "fp32", "fp16", "bf16"]
)


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def scores_of(count, seed=0, levels=20):
    """Few levels: many are equal."""
    return torch.randint(levels, (count,), generator=torch.Generator().manual_seed(seed)) / levels


def by_definition(ious, scores, threshold, labels=None, inclusive=False):
    """Rows that are kept, and each of them with those that it drops."""
    ious, labels = ious.tolist(), None if labels is None else labels.tolist()
    left = sorted(range(len(scores)), key=lambda row: (-scores[row].item(), row))
    kept, groups = [], []
    while left:
        best, *left = left
        dropped = {
            row: None for row in left
            if (labels is None or labels[row] == labels[best])
            and (ious[best][row] > threshold or (inclusive and ious[best][row] == threshold))
        }  # fmt: skip
        kept.append(best)
        groups.append([best, *dropped])
        left = [row for row in left if row not in dropped]
    return kept, groups


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 150])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.7, 1.0])
def test_it_keeps_what_the_definition_keeps(threshold, count, dtype, backend):
    flat, turned, scores = flat_boxes(count, 0, 9, dtype), rotated_boxes(count, 0, 9, dtype), scores_of(count)
    wide = dtype if dtype == torch.float64 else torch.float32
    limit = torch.tensor(threshold, dtype=wide).item()
    ious = box_iou(flat.to(wide), flat.to(wide))
    assert nms(flat, scores, threshold).tolist() == by_definition(ious, scores, limit)[0]
    ious = rotated_iou(turned.to(wide), turned.to(wide))
    assert rotated_nms(turned, scores, threshold).tolist() == by_definition(ious, scores, limit)[0]


@pytest.mark.parametrize("offset", [0, 1])
def test_labels_and_offsets(offset, backend):
    flat, turned, scores = flat_boxes(90, 1, 6), rotated_boxes(90, 1, 6, torch.float32), scores_of(90)
    labels = torch.randint(3, (90,), dtype=torch.int32)
    ious = box_iou(flat, flat, offset=offset)
    kept = nms(flat, scores, 0.2, offset, labels)
    assert kept.tolist() == by_definition(ious, scores, 0.2, labels)[0]
    assert len(kept) > len(nms(flat, scores, 0.2, offset))
    wanted = by_definition(rotated_iou(turned, turned), scores, 0.2, labels)[0]
    assert rotated_nms(turned, scores, 0.2, labels).tolist() == wanted
    quads = torch.tensor([[x for corner in corners_of(box) for x in corner] for box in turned])
    assert quad_nms(quads, scores, 0.2, labels).tolist() == wanted


def test_at_the_very_threshold(backend):
    flat = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    turned = torch.tensor([[0.0, 0, 2, 1, 0.3], [0, 0, 1, 1, 0.3]])
    scores = torch.tensor([0.9, 0.8])
    for run, boxes in ((nms, flat), (rotated_nms, turned)):
        assert run(boxes, scores, 0.5).tolist() == [0, 1]
        assert run(boxes, scores, 0.5, inclusive=True).tolist() == [0]
        assert run(boxes, scores, 0.4999).tolist() == [0]
    apart = torch.tensor([[0.0, 0, 2, 1, 0], [9, 9, 1, 1, 0]])
    assert rotated_nms(apart, scores, 0).tolist() == [0, 1]
    assert rotated_nms(apart, scores, 0, inclusive=True).tolist() == [0]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_many_ways_to_be_equal(data):
    """Boxes and scores of few kinds, in any order; groups are what the definition drops."""
    count, sides = data.draw(st.integers(0, 40)), st.integers(0, 3)
    corners = torch.tensor(
        [[data.draw(sides), data.draw(sides)] for _ in range(count)], dtype=torch.float32
    ).view(count, 2)  # fmt: skip
    boxes = torch.cat((corners, corners + torch.randint(1, 4, (count, 2))), 1)
    scores = scores_of(count, data.draw(st.integers(0, 99)), 4)
    threshold = data.draw(st.sampled_from([0.0, 1 / 7, 0.25, 0.5, 1.0]))
    limit = torch.tensor(threshold).item()
    ious = box_iou(boxes, boxes)
    assert nms(boxes, scores, threshold).tolist() == by_definition(ious, scores, limit)[0]
    groups = [group.tolist() for group in nms_match(boxes, scores, threshold)]
    assert groups == by_definition(ious, scores, limit, inclusive=True)[1]


def test_groups(backend):
    boxes, scores = flat_boxes(150, 2, 9), scores_of(150)
    for threshold in (0.05, 0.6):
        groups = [group.tolist() for group in nms_match(boxes, scores, threshold)]
        assert groups == by_definition(box_iou(boxes, boxes), scores, torch.tensor(threshold).item(), inclusive=True)[1]


def softened(boxes, scores, threshold, sigma, least, method, offset):
    """Soft-NMS as its paper has it, on lists; what is dropped leaves its place to the last box."""
    ious = box_iou(boxes, boxes, offset=offset)
    left, found = [[row, scores[row]] for row in range(len(boxes))], []
    while left:
        best = max(range(len(left)), key=lambda at: left[at][1])  # the first of equals
        left[0], left[best] = left[best], left[0]
        (row, score), left = left[0], left[1:]
        found.append((row, score.item()))
        for each in left:
            ratio = ious[row, each[0]]
            if method == "gaussian":
                each[1] = each[1] * (-(ratio * ratio) / sigma).exp()
            elif ratio >= threshold:
                each[1] = each[1] * (1 - ratio if method == "linear" else 0)
        at = 0
        while at < len(left):
            if left[at][1] < least:
                left[at] = left[-1]
                left.pop()
            else:
                at += 1
    return found


@DTYPES
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_scores_that_are_lowered(offset, method, dtype, backend):
    boxes, scores = flat_boxes(60, 3, 9, dtype), scores_of(60).to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    rows, left = soft_nms(boxes, scores, 0.25, 0.5, 0.125, method, offset)
    wanted = softened(boxes.to(wide), scores.to(wide), 0.25, 0.5, 0.125, method, offset)
    assert rows.tolist() == [row for row, _ in wanted]
    assert len(rows) < 60
    assert left.dtype == dtype
    torch.testing.assert_close(left.double(), torch.tensor([score for _, score in wanted], dtype=torch.float64),
                               rtol=torch.finfo(dtype).eps * 4, atol=0)  # fmt: skip


def test_nothing_but_the_best_is_left(backend):
    boxes, scores = torch.tensor([[0.0, 0, 1, 1]] * 5), torch.tensor([0.1, 0.5, 0.3, 0.5, 0.2])
    rows, left = soft_nms(boxes, scores, method="naive")
    assert rows.tolist() == [1]
    assert left.tolist() == [0.5]
    assert rotated_nms(torch.tensor([[0.0, 0, 1, 1, 0.2]] * 5), scores, 0.5).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_boxes_without_an_area_stay(dtype, backend):
    nan, inf = math.nan, math.inf
    turned = torch.tensor(
        [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, nan, 1, 0], [0, 0, -1, 1, 0], [0, 0, inf, inf, 0]], dtype=dtype
    )
    flat = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, nan, 1, 1], [1, 1, 0, 0], [0, 0, inf, inf]], dtype=dtype)
    scores = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    for boxes, run in ((turned, rotated_nms), (flat, nms)):
        assert run(boxes, scores, 0.0).tolist() == [0, 1, 2, 3, 4]
        assert run(boxes.repeat(2, 1), scores.repeat(2), 0.0).tolist() == [0, 1, 6, 2, 7, 3, 8, 4, 9]
    rows, _ = soft_nms(flat, scores.to(dtype))
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]


def test_scores_that_are_no_numbers(backend):
    boxes = rotated_boxes(20)
    scores = torch.where(torch.arange(20) % 3 == 0, math.nan, torch.rand(20))
    assert len(set(rotated_nms(boxes, scores, 0.3).tolist())) > 1
    rows, _ = soft_nms(flat_boxes(20), scores, method="gaussian")
    assert len(set(rows.tolist())) == len(rows)


def test_no_boxes(backend):
    none, scores = torch.zeros(0, 4), torch.zeros(0)
    assert nms(none, scores, 0.5).shape == (0,)
    assert nms(none, None, 0.5).dtype == torch.int64
    assert rotated_nms(torch.zeros(0, 5), scores, 0.5).shape == (0,)
    assert quad_nms(torch.zeros(0, 8), scores, 0.5).shape == (0,)
    assert nms_match(none, scores, 0.5) == []
    assert [each.shape for each in soft_nms(none, scores)] == [(0,), (0,)]


def test_boxes_in_order_need_no_scores(backend):
    boxes, scores = rotated_boxes(50, 0, 6), torch.rand(50)
    order = scores.sort(descending=True)[1]
    assert torch.equal(order[rotated_nms(boxes[order], None, 0.3)], rotated_nms(boxes, scores, 0.3))
    assert torch.equal(rotated_nms(boxes.T.contiguous().T, scores, 0.3), rotated_nms(boxes, scores, 0.3))


def test_they_are_sound_ops():
    flat, outlines = flat_boxes(9), rotated_outlines(rotated_boxes(9))
    torch.library.opcheck(NMS_BOXES._overload, (flat, torch.arange(9) % 2, 0.5, True, 0.0))
    torch.library.opcheck(NMS_OUTLINES._overload, (outlines, None, 0.5, False, True))
    torch.library.opcheck(NMS_MATCH._overload, (flat, 0.5))
    torch.library.opcheck(SOFT_NMS._overload, (flat, torch.rand(9), 0.3, 0.5, 1e-3, 1, 0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nms(torch.zeros(2, 5), torch.zeros(2), 0.5), r"boxes is torch\.float32 \(2, 5\)"),
        (lambda: nms(torch.zeros(2, 4).int(), torch.zeros(2), 0.5), r"boxes is torch\.int32 \(2, 4\)"),
        (lambda: nms(torch.zeros(2, 4), torch.zeros(3), 0.5), r"scores is torch\.float32 \(3,\), expected floating"),
        (lambda: nms(torch.zeros(2, 4), torch.zeros(2).int(), 0.5), r"scores is torch\.int32 \(2,\)"),
        (lambda: rotated_nms(torch.zeros(2, 5), None, 0.5, torch.zeros(2)), r"labels is torch\.float32 \(2,\)"),
        (lambda: nms(torch.zeros(2, 4), None, math.nan), "iou_threshold is nan"),
        (lambda: soft_nms(torch.zeros(2, 4), torch.zeros(2), method="hard"), "method is 'hard'"),
        (lambda: soft_nms(torch.zeros(2, 4), torch.zeros(2).double()), r"scores is torch\.float64, boxes"),
        (lambda: soft_nms(torch.zeros(2, 4), torch.zeros(2), sigma=0, method="gaussian"), "sigma is 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
