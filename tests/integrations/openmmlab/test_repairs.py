"""What of OpenMMLab fails on current libraries and without a GPU, and does not with the plugin ``mmcv``."""

import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
import types

import mmcv.ops
import mmengine
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from kernelgraft.patches import PatchSet
from kernelgraft_openmmlab.fixes import checkpoints, packages, repair_hosts

from .grids import SHAPE, scattered


@pytest.fixture
def repaired():
    assert not hasattr(mmcv.ops.SparseConvTensor.dense, "__wrapped__")  # or nothing would be compared with mmcv's own
    patches = PatchSet("test")
    repair_hosts(patches)
    yield patches
    patches.undo()


def checkpoint(path, **more):
    buffer = HistoryBuffer()
    buffer.update(1.5)
    hub = {"log_scalars": {"loss": buffer}, "runtime_info": {"lr": np.float64(0.1), "iter": np.int64(3)}}
    meta = {"dataset_meta": {"classes": ("Car",), "palette": np.zeros((1, 3), np.uint8)}}
    torch.save({"state_dict": {"w": torch.ones(2)}, "message_hub": hub, "meta": meta, **more}, path)
    return path


def test_checkpoints_of_mmengine_load(tmp_path, repaired):
    path = checkpoint(tmp_path / "epoch_1.pth")
    loaded = CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    assert loaded["message_hub"]["log_scalars"]["loss"].current() == 1.5
    assert loaded["message_hub"]["runtime_info"] == {"lr": 0.1, "iter": 3}
    assert loaded["meta"]["dataset_meta"]["palette"].shape == (1, 3)


def test_nothing_is_allowed_after_the_plugin_or_outside_of_mmengine(tmp_path):
    path = checkpoint(tmp_path / "epoch_1.pth")
    patches = PatchSet("test")
    repair_hosts(patches)
    CheckpointLoader.load_checkpoint(str(path))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)  # the types were allowed for mmengine's load alone
    patches.undo()
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(str(path))


@pytest.mark.parametrize(("version", "core"), [("1.26.4", "core"), ("2.3.5", "_core")])
def test_numpy_is_looked_for_where_it_is(monkeypatch, version, core):
    monkeypatch.setattr(checkpoints.np, "__version__", version)
    assert checkpoints._core() == core


class Harmful:
    """Pickled as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "harm",
    [Harmful(print, "this ran"), Harmful(getattr, HistoryBuffer, "__init__"), Harmful(getattr, np.ndarray, "tofile")],
    ids=["a function", "another method", "another type"],
)
def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, repaired, capsys, harm):
    path = checkpoint(tmp_path / "epoch_1.pth", extra=harm)
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(str(path))
    assert "this ran" not in capsys.readouterr().out


class TestWithoutPkgResources:
    """As with setuptools 82; the one here still has it."""

    @pytest.fixture
    def gone(self, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            packages.importlib.util, "find_spec", lambda n, *a: None if n == "pkg_resources" else find(n)
        )
        monkeypatch.setitem(sys.modules, "pkg_resources", None)
        patches = PatchSet("test")
        repair_hosts(patches)
        yield
        patches.undo()

    def test_configs_of_packages_are_found(self, gone, tmp_path):
        from mmengine.config import Config
        from mmengine.utils import get_installed_path, is_installed

        assert is_installed("mmdet3d")
        assert is_installed("mmsegmentation")  # the name of the distribution
        assert not is_installed("no_such_package")
        folder = importlib.util.find_spec("mmdet3d").submodule_search_locations[0]
        assert get_installed_path("mmdet3d") == folder
        assert get_installed_path("mmsegmentation").endswith("mmseg")
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            get_installed_path("no_such_package")
        path = tmp_path / "config.py"
        path.write_text("_base_ = 'mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py'")
        config = Config.fromfile(path)
        assert config.model.type == "VoxelNet"

    def test_it_fails_without_the_repair(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pkg_resources", None)
        with pytest.raises(ModuleNotFoundError, match="pkg_resources"):
            mmengine.utils.is_installed("mmdet3d")

    def test_what_is_no_package_of_its_own_says_so(self, tmp_path, monkeypatch):
        (tmp_path / "namespace_only").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(RuntimeError, match="namespace_only is a namespace package"):
            packages.get_installed_path("namespace_only")


def test_points_in_boxes_on_a_cpu(repaired):
    points = torch.tensor([[[0.0, 0.0, 0.5], [5.0, 5.0, 0.5]]])
    boxes = torch.tensor([[[0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.3], [5.0, 5.0, 0.0, 2.0, 2.0, 2.0, 0.0]]])
    assert mmcv.ops.points_in_boxes_part(points, boxes).tolist() == [[0, 1]]
    assert mmcv.ops.points_in_boxes_all(points, boxes).tolist() == [[[1, 0], [0, 1]]]
    with pytest.raises(ValueError, match=r"expected \(B, M, 3\) and \(B, T, 7\)"):
        mmcv.ops.points_in_boxes_all(points, boxes[..., :6])


def test_sampling_and_neighbours_on_a_cpu(repaired, rng):
    points = torch.randn(2, 50, 3, generator=rng)
    sampled = mmcv.ops.furthest_point_sample(points, 8)
    assert sampled.shape == (2, 8)
    assert sampled.dtype == torch.int32
    distances = torch.cdist(points, points)
    assert torch.equal(mmcv.ops.furthest_point_sample_with_dist(distances.square(), 8), sampled)
    nearest = mmcv.ops.knn(3, points, points[:, :5].contiguous())
    assert torch.equal(nearest.long(), distances[:, :5].topk(3, largest=False).indices.transpose(1, 2))
    with pytest.raises(ValueError, match="k is 100"):
        mmcv.ops.knn(100, points)


def test_a_shape_may_be_a_tensor_and_indices_any_integers(repaired):
    x = mmcv.ops.SparseConvTensor(torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([2, 2, 2]), 1)
    assert x.spatial_shape == [16, 16, 16]  # a measured grid is filled up
    assert x.indices.dtype == torch.int32
    assert x.sparity == 1 / 16**3
    assert mmcv.ops.SparseConvTensor(x.features, x.indices, (2, 3, 2), 1).spatial_shape == [2, 3, 2]


@pytest.mark.parametrize("channels_first", [True, False])
def test_a_dense_grid_is_mmcvs_with_its_gradient(repaired, rng, channels_first):
    features, indices = scattered()
    grids = []
    for dense in (mmcv.ops.SparseConvTensor.dense, mmcv.ops.SparseConvTensor.dense.__wrapped__):
        x = features.clone().requires_grad_()
        grid = dense(mmcv.ops.SparseConvTensor(x, indices, list(SHAPE), 2), channels_first)
        (grid * torch.arange(grid.numel()).view(grid.shape)).sum().backward()
        assert grid.is_contiguous()
        grids.append((grid, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grids, strict=True))


def voxelizer(**options):
    from mmdet3d.models import Det3DDataPreprocessor

    layer = {"max_num_points": -1, "point_cloud_range": [-100, -100, -20, 100, 100, 20], "voxel_size": [0.5] * 3,
             "max_voxels": (-1, -1)}  # fmt: skip
    return Det3DDataPreprocessor(voxel=True, voxel_type="minkunet", voxel_layer=layer, **options)


@pytest.mark.parametrize("batch_first", [True, False])
def test_voxels_of_minkunet_on_a_cpu(repaired, rng, batch_first):
    clouds = [torch.rand(n, 4, generator=rng) * 4 for n in (60, 30)]
    samples = [types.SimpleNamespace(gt_pts_seg=types.SimpleNamespace(pts_semantic_mask=torch.arange(len(c))))
               for c in clouds]  # fmt: skip
    made = voxelizer(batch_first=batch_first).voxelize(clouds, samples)
    column, rest = (0, slice(1, 4)) if batch_first else (3, slice(0, 3))
    for i, (cloud, sample) in enumerate(zip(clouds, samples, strict=True)):
        rows = made["coors"][:, column] == i
        sites, voxels = made["coors"][rows][:, rest], made["voxels"][rows]
        assert len(sites.unique(dim=0)) == len(sites)
        cells = torch.round(cloud[:, :3] / 0.5).int()
        assert torch.equal(sites[sample.point2voxel_map], cells - cells.min(0)[0])
        assert torch.equal(cloud[sample.gt_pts_seg.voxel_semantic_mask], voxels)
        assert torch.equal(sample.batch_idx, torch.full((len(sites),), i, dtype=torch.int32))


def test_boxes_of_a_camera_on_a_cpu(repaired):
    metric = pytest.importorskip("mmdet3d.evaluation.metrics.nuscenes_metric")
    from nuscenes.utils.data_classes import Box
    from pyquaternion import Quaternion

    turned = Quaternion(axis=[0, 0, 1], angle=0.5)
    box = Box([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], turned, label=7, score=0.25, velocity=(1.0, 0.0, 2.0))
    boxes, scores, labels = metric.nusc_box_to_cam_box3d([box])
    assert labels.tolist() == [7]
    assert scores.shape == (1, 11)
    assert scores[0, 7] == 0.25
    torch.testing.assert_close(boxes.gravity_center, torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(boxes.tensor[0, 3:], torch.tensor([5.0, 6.0, 4.0, -0.5, 1.0, 2.0]))


def test_an_adaption_that_fails_does_not_fail_the_import(tmp_path):
    (tmp_path / "adapted.py").write_text("x = 1\n")
    code = f"""
import sys, logging
logging.basicConfig(level=logging.ERROR, stream=sys.stdout, format="%(message)s")
sys.path.insert(0, {str(tmp_path)!r})
from kernelgraft_openmmlab.imports import when_imported
seen = []
undo = when_imported("adapted", lambda module: seen.append(module.x))
when_imported("adapted", lambda module: 1 / 0)
import adapted
assert seen == [1] and adapted.__spec__.loader.get_source("adapted") == "x = 1\\n", seen
undo(); undo()
when_imported("adapted", seen.append)()
assert seen == [1, adapted]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kernelgraft could not adapt adapted\nTraceback")


def test_deformable_attention_of_mmcvs_layers_runs_on_our_kernel(repaired, rng):
    from mmcv.ops import MultiScaleDeformableAttention
    from mmcv.ops import multi_scale_deform_attn as module

    layer = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=3, dropout=0.0)
    sizes = torch.tensor([[6, 5], [3, 4]])
    starts = torch.tensor([0, 30])
    query, value = torch.randn(7, 2, 32, generator=rng), torch.randn(42, 2, 32, generator=rng)
    points = torch.rand(2, 7, 2, 2, generator=rng)
    arguments = {"reference_points": points, "spatial_shapes": sizes, "level_start_index": starts}
    torch.nn.init.normal_(layer.sampling_offsets.weight)
    ours = module.multi_scale_deformable_attn_pytorch
    out = layer(query, value=value, **arguments)
    module.multi_scale_deformable_attn_pytorch = ours.__wrapped__
    try:
        expected = layer(query, value=value, **arguments)
    finally:
        module.multi_scale_deformable_attn_pytorch = ours
    torch.testing.assert_close(out, expected)
