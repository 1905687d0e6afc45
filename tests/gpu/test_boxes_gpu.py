"""Boxes on a GPU: the same as on a CPU, and what is kept is the same to the last box."""

import pytest
import torch

from kernelgraft_core import boxes as core

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=["fp64", "fp32", "fp16", "bf16"]
)


def scene(count, objects=None, dtype=torch.float32):
    """Rotated boxes as a detector finds them, several around each object, and their scores."""
    objects = objects or max(1, count // 10)
    centers = torch.rand(objects, 5) * torch.tensor([100, 100, 0, 0, 6.0]) + torch.tensor([0, 0, 4.5, 1.9, -3])
    boxes = centers[torch.randint(objects, (count,))] + torch.randn(count, 5) * torch.tensor([0.4, 0.4, 0.4, 0.2, 0.1])
    return boxes.to(dtype), torch.rand(count)


def flat(boxes):
    half = boxes[:, 2:4].abs() / 2
    return torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), 1)


@DTYPES
@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 700), (700, 65), (0, 5), (5, 0)], ids=str)
def test_overlaps(rows, columns, mode, dtype, device):
    a, b = scene(rows, 20, dtype)[0], scene(columns, 20, dtype)[0]
    for run, first, second in ((core.rotated_iou, a, b), (core.box_iou, flat(a), flat(b))):
        wanted, found = run(first, second, mode), run(first.to(device), second.to(device), mode)
        torch.testing.assert_close(found.cpu(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)
        least = min(rows, columns)
        pairs = first[:least].to(device), second[:least].to(device)
        torch.testing.assert_close(
            run(*pairs, mode, aligned=True), found[:least, :least].diagonal(), rtol=0, atol=0
        )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 9000])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_same_boxes_are_kept(labelled, count, dtype, device):
    boxes, scores = scene(count, dtype=dtype)
    labels = torch.randint(3, (count,)) if labelled else None
    there = None if labels is None else labels.to(device)
    for threshold in (0.0, 0.3, 0.7):
        wanted = core.rotated_nms(boxes, scores, threshold, labels)
        found = core.rotated_nms(boxes.to(device), scores.to(device), threshold, there)
        assert torch.equal(found.cpu(), wanted)
        wanted = core.nms(flat(boxes), scores, threshold, 0, labels)
        assert torch.equal(core.nms(flat(boxes).to(device), scores.to(device), threshold, 0, there).cpu(), wanted)


def test_quads_and_thresholds(device):
    boxes, scores = scene(500)
    quads = torch.rand(500, 1, 2) * 40 + torch.tensor([[0, 0], [3, 0], [3, 2], [0, 2.0]]) + torch.rand(500, 4, 2)
    quads = quads.flatten(1)
    there = quads.to(device), scores.to(device)
    assert torch.equal(core.quad_nms(*there, 0.2).cpu(), core.quad_nms(quads, scores, 0.2))
    assert len(core.rotated_nms(boxes.to(device), there[1], 0.0, inclusive=True)) == 1
    flat_there = flat(boxes).to(device)
    wanted = core.soft_nms(flat(boxes), scores)
    found = core.soft_nms(flat_there, there[1])
    assert torch.equal(found[0].cpu(), wanted[0])
    groups = core.nms_match(flat_there, there[1], 0.4)
    assert [each.tolist() for each in groups] == [each.tolist() for each in core.nms_match(flat(boxes), scores, 0.4)]


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5000, 40), (3, 129, 200), (0, 3, 2), (2, 0, 3), (2, 3, 0)], ids=str)
def test_points(sizes, dtype, device):
    batches, count, boxes = sizes
    points = (torch.rand(batches, count, 3) * 20).to(dtype)
    found = (torch.rand(batches, boxes, 7) * torch.tensor([20, 20, 10, 8, 6, 9, 6])).to(dtype)
    there = points.to(device), found.to(device)
    # Their cosines may differ in the last bit: what is at a side may part.
    for run in (core.points_in_boxes, core.first_box_of_points):
        wanted = run(points, found)
        different = run(*there).cpu() != wanted
        assert different.sum() <= 1e-4 * different.numel()
    if batches:
        polygons = (torch.rand(boxes, 8) * 20).to(dtype)
        wanted = core.points_in_polygons(points[0, :, :2], polygons)
        assert torch.equal(core.points_in_polygons(there[0][0, :, :2], polygons.to(device)).cpu(), wanted)


def test_vertices(device):
    vertices, mask = torch.randn(3, 50, 24, 2), torch.rand(3, 50, 24) < 0.3
    found = core.sort_overlap_vertices(vertices.to(device), mask.to(device))
    assert torch.equal(found.cpu(), core.sort_overlap_vertices(vertices, mask))
