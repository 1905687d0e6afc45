"""The detectors and segmentors that mmdet3d ships, on scans, without a compiled mmcv."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")
from .detectors import DETECTORS, NEEDS_TORCHSPARSE, build, infer, largest_difference
from .scans import scan

pytestmark = pytest.mark.usefixtures("mmcv_plugin")
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Denormal numbers take a CPU a hundred times as long."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


HEAVY = ("cylinder3d", "centerpoint-voxel", "centerpoint-dcn", "flatformer-nuscenes", "pv-rcnn", "part-a2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in DETECTORS],
)
def detector(request):
    config, name = DETECTORS[request.param]
    return build(config), name


def clouds_of(name):
    whole = scan(name, 12.0 if name == "semantickitti" else 25.0)
    return whole, whole[: len(whole) * 2 // 3] * np.float32([1, -1, 1, 1, 1][: whole.shape[1]])


def test_a_batch_of_two_is_two_batches_of_one(detector):
    model, name = detector
    first, second = clouds_of(name)
    found, together = infer(model, first, second)
    alone = [infer(model, cloud)[1] for cloud in (first, second)]
    assert len(found) == 2
    assert largest_difference(together, *alone) < TOLERANCE


def spoilt(cloud):
    cloud[::7, 0] = np.nan
    cloud[3::7, 2] = np.inf
    cloud[5::7, 3] = np.nan
    return cloud


class TestClouds:
    """What may come out of a sensor; the detectors are built once more, each for all of its clouds."""

    @pytest.fixture(
        scope="class",
        params=["second", "pointpillars", "flatformer-kitti", pytest.param("pv-rcnn", marks=pytest.mark.slow)],
    )
    @classmethod
    def model(cls, request):
        return build(DETECTORS[request.param][0])

    @pytest.mark.parametrize("cloud", ["empty", "out of range", "one point"])
    def test_detectors_take_clouds_without_points(self, model, cloud, caplog):
        whole = scan("kitti")
        clouds = {
            "empty": whole[:0],
            "out of range": whole + np.float32([1000, 0, 0, 0]),
            "one point": np.float32([[10.0, 0.0, -1.0, 0.5]]),
        }
        found, alone = infer(model, clouds[cloud])
        assert all(tensor.isfinite().all() for tensor in alone)
        assert found[0].pred_instances_3d.scores_3d.isfinite().all()
        found, together = infer(model, whole, clouds[cloud])  # as the last sample it would be forgotten
        assert len(found) == 2
        assert largest_difference(together, infer(model, whole)[1], alone) < TOLERANCE

    def test_points_that_are_not_finite_are_left_out(self, model):
        cloud = spoilt(scan("kitti").copy())
        kept = cloud[np.isfinite(cloud).all(1)]
        (found,), heads = infer(model, cloud)
        (expected,), truth = infer(model, kept)
        for tensor, other in zip(heads, truth, strict=True):
            torch.testing.assert_close(tensor, other)
        torch.testing.assert_close(found.pred_instances_3d.scores_3d, expected.pred_instances_3d.scores_3d)


def test_a_cloud_without_points_is_told_once(caplog):
    model = build(DETECTORS["pointpillars"][0])
    from kernelgraft_core.runtime.notices import warn_once

    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "kernelgraft"):
        for _ in range(2):
            infer(model, scan("kitti")[:0])
    assert caplog.text.count("a scan has no points within [0.0, -39.68, -3.0, 69.12, 39.68, 1.0]") == 1


@pytest.mark.parametrize("name", ["cylinder3d", "minkunet"])
def test_segmentors_refuse_what_has_no_class(name):
    model = build(DETECTORS[name][0])
    cloud = scan("semantickitti")[:500].copy()
    with pytest.raises(ValueError, match="sample 1 of the batch has no points"):
        infer(model, cloud, cloud[:0])
    cloud[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"point 7 of sample 0 is \[.*nan.*\]: drop what is not finite"):
        infer(model, cloud)
    found, _ = infer(model, cloud[:1])
    assert found[0].pred_pts_seg.pts_semantic_mask.shape == (1,)


def test_more_voxels_than_the_cap_are_the_first_ones_every_time():
    model = build(DETECTORS["second"][0])
    model.data_preprocessor.voxel_layer.max_voxels = (500, 500)
    cloud = scan("kitti")
    first, second = (infer(model, cloud)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    voxels = model.data_preprocessor.voxelize([torch.from_numpy(cloud)], [None])
    assert len(voxels["coors"]) == 500
    assert torch.equal(voxels["voxels"][0, 0], torch.from_numpy(cloud)[in_range(cloud, model)][0])


def in_range(cloud, model):
    low, high = np.float32(model.data_preprocessor.voxel_layer.point_cloud_range).reshape(2, 3)
    return ((cloud[:, :3] >= low) & (cloud[:, :3] < high)).all(1)


@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=pytest.mark.slow) if name == "spvcnn" else name for name in NEEDS_TORCHSPARSE]
)
def test_networks_of_torchsparse_run_on_its_facade(network):
    """The facade has to be there before mmdet3d is imported: in a process of its own."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_flush_denormal(True)
import kernelgraft
kernelgraft.load_plugin("mmcv")
kernelgraft.load_plugin("sparse-conv", facade="torchsparse")
from detectors import NEEDS_TORCHSPARSE, build, infer, largest_difference
from scans import scan
config, data = NEEDS_TORCHSPARSE[sys.argv[2]]
model = build(config)
first, second = scan(data, 10.0), scan(data, 8.0)
found, together = infer(model, first, second)
alone = [infer(model, cloud)[1] for cloud in (first, second)]
assert found[0].pred_pts_seg.pts_semantic_mask.shape == (len(first),)
print("largest difference", largest_difference(together, *alone))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), network],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("largest difference")[1]) < TOLERANCE
