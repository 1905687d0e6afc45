"""Overlaps: every backend against plain clipping in rational numbers, and boxes that are not like others."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.boxes import box_iou, boxes_overlap_bev, quad_iou, rotated_iou
from kernelgraft_core.boxes.outlines import rotated_outlines
from kernelgraft_core.boxes.overlap.ops import BOX_IOU, OUTLINE_OVERLAP

from .box_cases import corners_of, exact_ious, flat_boxes, rotated_boxes, shared_area

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "fp16", "bf16"])
MODES = pytest.mark.parametrize("mode", ["iou", "iof"])


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def iou_of(first, second, **options):
    return rotated_iou(*(torch.tensor([box], dtype=torch.float64) for box in (first, second)), **options).item()


@DTYPES
@MODES
def test_rotated_boxes_are_clipped_exactly(mode, dtype, backend):
    a, b = rotated_boxes(13, 0, 6, dtype), rotated_boxes(17, 1, 6, dtype)
    found, wanted = rotated_iou(a, b, mode), exact_ious(a, b, mode)
    assert found.dtype == dtype
    assert (wanted > 0).float().mean() > 0.2
    assert (wanted == 0).any()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    paired = rotated_iou(a, b[:13], mode, aligned=True)
    assert torch.equal(paired, found[:, :13].diagonal())


@DTYPES
@MODES
@pytest.mark.parametrize("offset", [0, 1])
def test_flat_boxes_are_their_definition(offset, mode, dtype, backend):
    a, b = flat_boxes(9, 0, 8, dtype), flat_boxes(130, 1, 8, dtype)
    found = box_iou(a, b, mode, offset=offset)
    assert found.dtype == dtype
    for i, first in enumerate(a.double().tolist()):
        for j, second in enumerate(b.double().tolist()):
            sides = [min(first[k + 2], second[k + 2]) - max(first[k], second[k]) + offset for k in (0, 1)]
            shared = max(0, sides[0]) * max(0, sides[1])
            areas = [(x2 - x1 + offset) * (y2 - y1 + offset) for x1, y1, x2, y2 in (first, second)]
            wanted = shared / (sum(areas) - shared if mode == "iou" else areas[0])
            assert found[i, j].item() == pytest.approx(wanted, abs=TOLERANCE[dtype])
    assert torch.equal(box_iou(a, b[:9], mode, True, offset), found[:, :9].diagonal())


def test_flat_is_rotated_by_nothing(backend):
    flat = flat_boxes(40, 3, dtype=torch.float64)
    turned = torch.cat(((flat[:, :2] + flat[:, 2:]) / 2, flat[:, 2:] - flat[:, :2], torch.zeros(40, 1)), 1)
    torch.testing.assert_close(rotated_iou(turned, turned), box_iou(flat, flat), rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_boxes_of_few_kinds(data):
    """Small numbers: corners and edges fall on each other all the time."""
    sizes, angles = st.sampled_from([1, 2, 3]), st.sampled_from([i * math.pi / 4 for i in range(-8, 9)])
    places = st.integers(-2, 2)
    a, b = ([data.draw(each) for each in (places, places, sizes, sizes, angles)] for _ in range(2))
    wanted = exact_ious([a], [b])[0, 0]
    found = rotated_iou(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(-17, -3), st.integers(-17, -3), st.integers(0, 8))
def test_nearly_the_same_box(seed, shift, turn, quarters):
    """Edges that are nearly parallel cross anywhere: that must not matter."""
    box = rotated_boxes(1, seed)[0]
    other = box + torch.tensor([10.0**shift, -(10.0**shift), 0, 0, 10.0**turn + quarters * math.pi / 2])
    if quarters % 2:
        other[2:4] = other[2:4].flip(0)
    wanted = exact_ious(box[None], other[None])[0, 0].item()
    for mode in (rotated_iou(box[None], other[None]), rotated_iou(other[None], box[None])):
        assert mode.item() == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, math.pi / 2, 3.0, -100.7])
def test_a_box_and_itself(angle, backend):
    box = [3.0, -2.0, 4.0, 0.5, angle]
    assert iou_of(box, box) == pytest.approx(1, abs=1e-12)
    assert iou_of(box, [3.0, -2.0, 4.0, 0.5, angle + math.pi]) == pytest.approx(1, abs=1e-12)
    assert iou_of(box, [3.0, -2.0, 0.5, 4.0, angle + math.pi / 2]) == pytest.approx(1, abs=1e-12)
    assert iou_of(box, [3.0, -2.0, 2.0, 0.25, angle]) == pytest.approx(0.25, abs=1e-12)
    assert iou_of([3.0, -2.0, 2.0, 0.25, angle], box, mode="iof") == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_boxes_that_touch_share_nothing(angle, backend):
    cos, sin = math.cos(angle), math.sin(angle)
    for along, across in ((2, 0), (0, 1), (2, 1), (2, 0.5), (-2, 0.25)):
        other = [along * cos - across * sin, along * sin + across * cos, 2, 1, angle]
        assert iou_of([0, 0, 2, 1, angle], other) == pytest.approx(0, abs=1e-12)


def test_boxes_without_an_area(backend):
    nan, inf = math.nan, math.inf
    odd = torch.tensor([
        [0, 0, 0, 0, 0], [0, 0, 2, 0, 1], [0, 0, 0, 2, 1], [0, 0, -2, 2, 0], [nan, 0, 2, 2, 0], [0, 0, nan, 2, 0],
        [0, 0, 2, 2, nan], [inf, 0, 2, 2, 0], [0, 0, inf, 2, 0], [0, 0, inf, inf, 1], [0, 0, 2, 2, inf],
    ], dtype=torch.float64)  # fmt: skip
    sound = torch.tensor([[0, 0, 2, 2, 0.1], [0, 0, 1e30, 1e30, 0.3]], dtype=torch.float64)
    for mode in ("iou", "iof"):
        assert rotated_iou(odd, odd, mode).eq(0).all()
        assert rotated_iou(odd, sound, mode).eq(0).all()
        assert rotated_iou(sound, odd, mode).eq(0).all()
    assert iou_of([0, 0, -2, -3, 0.4], [0, 0, 2, 3, 0.4]) == pytest.approx(1)  # turned by half


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e6, 1e30])
def test_any_size_anywhere(scale, backend):
    a, b = rotated_boxes(6, 0, 4), rotated_boxes(6, 1, 4)
    wanted = rotated_iou(a, b)
    scaled = [torch.cat((box[:, :4] * scale, box[:, 4:]), 1) for box in (a, b)]
    torch.testing.assert_close(rotated_iou(*scaled), wanted, rtol=1e-9, atol=1e-9)
    moved = [box + torch.tensor([2.0**20, -(2.0**22), 0, 0, 0]) for box in (a, b)]
    torch.testing.assert_close(rotated_iou(*moved), wanted, rtol=1e-8, atol=1e-8)


def test_a_small_box_within_a_huge_one(backend):
    huge, small = [0, 0, 1e7, 1e6, 0.5], [1e6, 2e5, 1e-3, 2e-3, 2.0]
    assert iou_of(small, huge, mode="iof") == pytest.approx(1, abs=1e-6)
    assert iou_of(huge, small, mode="iof") == pytest.approx(2e-19, rel=1e-6)


def test_flat_boxes_that_are_empty_or_broken(backend):
    boxes = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [math.nan, 0, 1, 1], [0, 0, 1, 1], [0, 0, math.inf, 1]])
    found = box_iou(boxes, boxes)
    wanted = torch.zeros(5, 5)
    wanted[3, 3] = 1
    assert torch.equal(found, wanted)


def test_quads_either_way_around(backend):
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(14, 4, generator=generator) * 2 * math.pi).sort(1)[0]
    center, radii = torch.rand(14, 1, 2, generator=generator) * 3, torch.rand(14, 1, 2, generator=generator) * 2 + 1
    quads = (center + radii * torch.stack((angles.cos(), angles.sin()), 2)).double()  # on ellipses: convex
    wanted = torch.zeros(7, 7, dtype=torch.float64)
    for i in range(7):
        for j in range(7):
            wanted[i, j] = shared_area(quads[i].tolist(), quads[7 + j].tolist())
    areas = torch.tensor([shared_area(q.tolist(), q.tolist()) for q in quads], dtype=torch.float64)
    wanted = wanted / (areas[:7, None] + areas[7:] - wanted)
    assert (wanted > 0).float().mean() > 0.3
    a, b = quads[:7].reshape(7, 8), quads[7:]
    torch.testing.assert_close(quad_iou(a, b.reshape(7, 8)), wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(quad_iou(a, b.flip(1).reshape(7, 8)), wanted, rtol=1e-11, atol=1e-12)


def test_quads_of_three_corners(backend):
    triangle = torch.tensor([[0.0, 0, 4, 0, 0, 4, 0, 4]])
    square = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]])
    assert quad_iou(triangle, square).item() == pytest.approx(0.5)
    assert quad_iou(square, triangle).item() == pytest.approx(0.5)
    assert quad_iou(triangle, triangle).item() == pytest.approx(1)


def test_seen_from_above(backend):
    a, b = rotated_boxes(8, 0, 5), rotated_boxes(9, 1, 5)
    raised = [
        torch.cat((box[:, :2], torch.randn(len(box), 1), box[:, 2:4], torch.rand(len(box), 1), box[:, 4:]), 1)
        for box in (a, b)
    ]
    torch.testing.assert_close(boxes_overlap_bev(*raised), exact_ious(a, b, "area"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0), (1, 1)], ids=str)
def test_few_or_no_boxes(rows, columns, backend):
    assert rotated_iou(rotated_boxes(rows), rotated_boxes(columns)).shape == (rows, columns)
    assert box_iou(flat_boxes(rows), flat_boxes(columns)).shape == (rows, columns)
    assert rotated_iou(rotated_boxes(rows), rotated_boxes(rows), aligned=True).shape == (rows,)
    assert box_iou(flat_boxes(rows), flat_boxes(rows), aligned=True).shape == (rows,)


def test_boxes_in_any_memory(backend):
    a, b = rotated_boxes(6, 0, 5), rotated_boxes(7, 1, 5)
    wanted = rotated_iou(a, b)
    assert torch.equal(rotated_iou(a.T.contiguous().T, torch.cat((b, b), 1)[:, :5]), wanted)
    flat = flat_boxes(6, 0, 5)
    assert torch.equal(box_iou(flat.T.contiguous().T, flat), box_iou(flat, flat))


def test_threads_do_not_change_the_result(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("kernelgraft_core.boxes.overlap.cpu.PAIRS", 64)
    a, b, found = rotated_boxes(30), rotated_boxes(40, 1), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((rotated_iou(a, b), box_iou(a[:, :4], b[:, :4])))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_they_are_sound_ops():
    flat, outlines = flat_boxes(5), rotated_outlines(rotated_boxes(4))
    torch.library.opcheck(BOX_IOU._overload, (flat, flat[:3], 1, False, 0.0))
    torch.library.opcheck(OUTLINE_OVERLAP._overload, (outlines, outlines, 2, True, torch.float32))
    compiled = torch.compile(rotated_iou, fullgraph=True, backend="eager")
    boxes = rotated_boxes(4)
    assert torch.equal(compiled(boxes, boxes), rotated_iou(boxes, boxes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotated_iou(torch.zeros(2, 4), torch.zeros(2, 5)), r"a is torch\.float32 \(2, 4\), expected floating"),
        (lambda: quad_iou(torch.zeros(2, 8), torch.zeros(2, 8).long()), r"b is torch\.int64 \(2, 8\)"),
        (lambda: box_iou(torch.zeros(2, 4), torch.zeros(2, 4).double()), r"b is torch\.float64 on cpu, a torch"),
        (lambda: box_iou(torch.zeros(2, 4), torch.zeros(3, 4), aligned=True), "there are 2 boxes a and 3 boxes b"),
        (lambda: box_iou(torch.zeros(2, 4), torch.zeros(3, 4), "giou"), "mode is 'giou'"),
        (lambda: boxes_overlap_bev(torch.zeros(7), torch.zeros(3, 7)), r"a is torch\.float32 \(7,\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gradient_is_refused():
    with pytest.raises(NotImplementedError, match="outline_overlap has no gradient"):
        rotated_iou(rotated_boxes(2).requires_grad_(), rotated_boxes(2)).sum().backward()


def test_corners_of_the_definition():
    outlines = rotated_outlines(rotated_boxes(3))
    for i, box in enumerate(rotated_boxes(3)):
        corners = torch.tensor(corners_of(box), dtype=torch.float64).T + 0 * outlines[:2, i, None]
        torch.testing.assert_close(outlines[5:].view(2, 4, 3)[:, :, i] + outlines[:2, i, None], corners)
