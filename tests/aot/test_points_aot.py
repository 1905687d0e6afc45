"""The kernels of point clouds for four architectures: none spills, and what is held in registers fits."""

import pytest

from kernelgraft_core.points.neighbors import triton as neighbors
from kernelgraft_core.points.reduce import triton as reduction
from kernelgraft_core.points.sampling import triton as sampling
from kernelgraft_core.runtime.aot import report

ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids="sm{}".format)


def check(kernel, arguments, constants, arch, warps):
    found = report(kernel, arguments, constants, arch, warps=warps, stages=3)
    assert (found.stack, found.local) == (0, 0), "registers spill"
    assert found.launchable
    assert found.resident >= 1
    return found


@ARCHS
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_reduction(kind, arch):
    arguments = {"feats": "*fp16", "order": "*i64", "starts": "*i64", "out": "*fp16", "source": "*i64", "channels": 64}
    constants = {"KIND": kind, "ROWS": reduction.ROWS, "WIDTH": reduction.CHANNELS}
    check(reduction.reduce_rows_kernel, arguments, constants, arch, 1)


@ARCHS
@pytest.mark.parametrize(("points", "distances"), [(1024, False), (8192, False), (100_000, False), (4096, True)])
def test_sampling(points, distances, arch):
    fits = points <= sampling.IN_REGISTERS and not distances
    block = points if fits else sampling.TILE
    arguments = {"values": "*fp32", "nearest": "*fp32", "found": "*i32", "points": points, "samples": 2048}
    constants = {"DISTANCES": distances, "FITS": fits, "BLOCK": block}
    check(sampling.sample_kernel, arguments, constants, arch, min(32, block // 128))


SHARED = {"points": "*fp32", "centers": "*fp32", "starts": "*i64", "clouds": "*i64", "rows": "*i32"}


@ARCHS
@pytest.mark.parametrize("width", [2, 4, 16, neighbors.MOST_NEIGHBORS])
def test_nearest(width, arch):
    arguments = SHARED | {"squares": "*fp32", "neighbors": width - 1 if width > 2 else 1}
    check(neighbors.nearest_kernel, arguments, {"WIDTH": width, "TILE": neighbors.TILE}, arch, 4)


@ARCHS
def test_within(arch):
    arguments = SHARED | {"low": "fp32", "high": "fp32", "samples": 32}
    check(neighbors.within_kernel, arguments, {"TILE": neighbors.TILE}, arch, 4)
