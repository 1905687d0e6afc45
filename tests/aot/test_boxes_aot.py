"""The kernels of boxes for four architectures: they keep what they compute with in registers."""

import pytest

from kernelgraft_core.boxes import triton_kernels
from kernelgraft_core.boxes.nms import triton as nms
from kernelgraft_core.boxes.overlap import triton as overlap
from kernelgraft_core.boxes.points import triton as points
from kernelgraft_core.runtime.aot import report

ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids="sm{}".format)


@pytest.fixture(autouse=True)
def without_fusion(monkeypatch):
    """As they are launched, see ``EXACT``."""
    assert overlap.EXACT == {"enable_fp_fusion": False}
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")


def check(kernel, arguments, constants, arch, warps, programs=1):
    found = report(kernel, arguments, constants, arch, warps=warps, stages=3)
    assert (found.stack, found.local) == (0, 0), "registers spill"
    assert found.launchable
    assert found.resident >= programs


@ARCHS
@pytest.mark.parametrize("aligned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_overlaps(aligned, arch):
    sizes = {"a_count": 501, "b_count": 501}
    constants = {"MODE": 1, "ALIGNED": aligned, "BLOCK": overlap.BLOCK}
    outlines = {"a": "*fp64", "b": "*fp64", "out": "*fp32"}
    check(triton_kernels.overlap_kernel, outlines | sizes, constants, arch, overlap.WARPS, 4)
    boxes = {"a": "*fp32", "b": "*fp32", "out": "*fp16", "numbers": "*fp32"}
    check(triton_kernels.box_kernel, boxes | sizes, constants, arch, overlap.WARPS, 8)


@pytest.mark.slow
@ARCHS
def test_suppression(arch):
    sizes = {"labels": "*i64", "mask": "*i64", "count": 4097, "words": 65}
    for single in (True, False):
        outlines = {"outlines": "*fp64", "limit": "*fp64"}
        constants = {"SINGLE": single, "LABELLED": True}
        check(triton_kernels.outline_mask_kernel, outlines | sizes, constants, arch, nms.WARPS, 4)
    for dtype in ("*fp32", "*fp64"):
        boxes = {"boxes": dtype, "numbers": dtype}
        check(triton_kernels.box_mask_kernel, boxes | sizes, {"LABELLED": True}, arch, nms.WARPS, 8)


@pytest.mark.slow
@ARCHS
@pytest.mark.parametrize("words", [1, 65, nms.LARGEST // 64])
def test_the_pass_through_all_boxes(words, arch):
    lanes = 1 << (words - 1).bit_length()
    arguments = {"mask": "*i64", "keep": "*i8", "count": 64 * words, "words": words}
    constants = {"WORDS": lanes, "GROUP": nms.GROUP}
    if words == 1:
        constants["words"] = arguments.pop("words")
    check(triton_kernels.keep_kernel, arguments, constants, arch, nms.warps_of(lanes))


@pytest.mark.slow
@ARCHS
def test_points(arch):
    sizes = {"count": 20_001, "boxes": 33, "blocks": 157}
    for first, out in ((True, "*i32"), (False, "*i8")):
        arguments = {"points": "*fp32", "frames": "*fp32", "out": out} | sizes
        check(points.boxes_kernel, arguments, {"FIRST": first, "BLOCK": points.BLOCK}, arch, points.WARPS, 8)
    arguments = {"points": "*fp64", "polygons": "*fp64", "out": "*i8"} | sizes
    check(points.polygons_kernel, arguments, {"BLOCK": points.BLOCK}, arch, points.WARPS, 4)
