"""The Triton kernels of boxes in the interpreter, on CPU tensors, against the references."""

import os

import pytest
import torch

from kernelgraft_core.boxes.nms import reference as nms_reference
from kernelgraft_core.boxes.outlines import rotated_outlines
from kernelgraft_core.boxes.overlap import reference
from kernelgraft_core.boxes.points import reference as points_reference
from kernelgraft_core.boxes.points.ops import _prepared
from kernelgraft_core.runtime.testing import poison_empty

from .box_cases import flat_boxes, rotated_boxes

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.boxes.nms import triton as nms_triton
    from kernelgraft_core.boxes.overlap import triton
    from kernelgraft_core.boxes.points import triton as points_triton
else:
    triton = nms_triton = points_triton = None

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@DTYPES
@pytest.mark.parametrize("mode", [reference.AREA_OF_OVERLAP, reference.IOU, reference.IOF])
def test_overlaps_of_outlines(mode, dtype):
    a, b = (rotated_outlines(rotated_boxes(count, seed, 6)) for count, seed in ((3, 0), (70, 1)))
    b[:, 5], b[4, 6] = torch.nan, 0
    a = torch.cat((a, b[:, 3:4]), 1)  # one and the same
    with poison_empty():
        found = triton.outline_overlap(a, b, mode, False, dtype)
        paired = triton.outline_overlap(b, b.flip(1), mode, True, dtype)
    torch.testing.assert_close(found, reference.outline_overlap(a, b, mode, False, dtype), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(
        paired, reference.outline_overlap(b, b.flip(1), mode, True, dtype), rtol=1e-6, atol=1e-12
    )


@DTYPES
@pytest.mark.parametrize("mode", [reference.IOU, reference.IOF])
def test_overlaps_of_flat_boxes(mode, dtype):
    a, b = flat_boxes(4, 0, 6, dtype), flat_boxes(70, 1, 6, dtype)
    b[3] = b[3].flip(0)
    with poison_empty():
        found = triton.box_iou(a, b, mode, False, 1.0)
        paired = triton.box_iou(b, b.flip(0), mode, True, 0.0)
    assert torch.equal(found, reference.box_iou(a, b, mode, False, 1.0))
    assert torch.equal(paired, reference.box_iou(b, b.flip(0), mode, True, 0.0))


@pytest.mark.parametrize(("count", "labelled"), [(1, False), (64, True), (70, False)], ids=str)
def test_suppression(count, labelled):
    flat, outlines = flat_boxes(count, 0, 12), rotated_outlines(rotated_boxes(count, 0, 12))
    labels = torch.arange(count) % 2 if labelled else None
    with poison_empty():
        found = nms_triton.nms_outlines(outlines, labels, 0.2, False, True)
        kept = nms_triton.nms_boxes(flat, labels, 0.3, False, 0.0)
    assert torch.equal(found, nms_reference.nms_outlines(outlines, labels, 0.2, False, True))
    assert torch.equal(kept, nms_reference.nms_boxes(flat, labels, 0.3, False, 0.0))


def test_a_threshold_below_0_leaves_the_best():
    outlines = rotated_outlines(rotated_boxes(10, 0, 90))
    assert nms_triton.nms_outlines(outlines, None, 0.0, True, True).nonzero().tolist() == [[0]]
    assert nms_triton.nms_outlines(outlines[:, :0], None, 0.5, False, True).shape == (0,)
    assert nms_triton.nms_boxes(flat_boxes(0), None, 0.5, False, 0.0).shape == (0,)


@DTYPES
def test_points(dtype):
    boxes = torch.rand(2, 5, 7, dtype=dtype) * 5
    prepared = _prepared(torch.rand(2, 140, 3, dtype=dtype) * 6, boxes)
    with poison_empty():
        found = points_triton.points_in_boxes_all(*prepared)
        first = points_triton.points_in_boxes_first(*prepared)
    assert found.any()
    assert torch.equal(found, points_reference.points_in_boxes_all(*prepared))
    assert torch.equal(first, points_reference.points_in_boxes_first(*prepared))
    points, polygons = torch.randint(0, 5, (140, 2)).to(dtype), torch.randint(0, 5, (6, 8)).to(dtype)
    with poison_empty():
        found = points_triton.points_in_polygons(points, polygons)
    assert torch.equal(found, points_reference.points_in_polygons(points, polygons))
