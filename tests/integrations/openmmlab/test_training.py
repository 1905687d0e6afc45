"""Training through mmengine's Runner, from the configs in examples/mmdet3d, on labelled scans."""

import pickle
import shutil
import sys

import numpy as np
import pytest
import torch

import kernelgraft

pytest.importorskip("mmdet3d")
from mmdet3d.apis import inference_detector, init_model
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.runner import Runner

from .detectors import EXAMPLES
from .scans import DATA

pytestmark = pytest.mark.usefixtures("mmcv_plugin")
needs_scans = pytest.mark.skipif(
    not (DATA / "lidar/kitti/000008.pkl").is_file(), reason=f"no scans in {DATA}: set KERNELGRAFT_TEST_DATA"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Overrides of the configs go with the test; denormal numbers take a CPU a hundred times as long."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    kernelgraft.unload_plugin("sparse-conv")


def train(config, tmp_path, steps=None):
    """The losses that the log has, and the Runner."""
    config.work_dir = str(tmp_path / "work")
    config.randomness = {"seed": 0}
    if steps is not None:
        config.train_cfg.max_iters = steps
        config.train_cfg.val_interval = steps + 1
        config.param_scheduler = []
        config.default_hooks.logger.interval = 1
    runner = Runner.from_cfg(config)
    runner.train()
    return runner.message_hub.get_scalar("train/loss").data[0], runner


def kitti(name):
    config = Config.fromfile(EXAMPLES / name)
    config.train_dataloader.dataset.data_root = str(DATA / "lidar/kitti")
    config.train_dataloader.dataset.ann_file = "000008.pkl"
    return config


@needs_scans
def test_second_learns(tmp_path):
    losses, runner = train(kitti("second_kitti_scan.py"), tmp_path, steps=5)
    assert type(runner.model.middle_encoder.conv_input[0]).__module__ == "kernelgraft_openmmlab.sparse_layers"
    assert np.isfinite(losses).all()
    assert losses[-2:].mean() < 0.8 * losses[:2].mean(), losses


@needs_scans
def test_flatformer_learns(tmp_path):
    second, config = kitti("second_kitti_scan.py"), Config.fromfile(EXAMPLES / "flatformer_kitti.py")
    for part in ("train_dataloader", "train_cfg", "optim_wrapper", "log_processor", "default_hooks"):
        config[part] = second[part]
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    losses, runner = train(config, tmp_path, steps=8)
    weights = runner.model.middle_encoder.block_list[0].block[0].attn.attn.in_proj_weight
    assert runner.optim_wrapper.optimizer.state[weights]["exp_avg"].abs().max() > 0
    assert np.isfinite(losses).all()
    assert losses[-2:].mean() < 0.8 * losses[:2].mean(), losses


def semantic_kitti(tmp_path, radius=None):
    """The first scan with its labels, or what is within ``radius``."""
    folder = DATA / "lidar/semantickitti"
    points = np.fromfile(folder / "000000.bin", np.float32).reshape(-1, 4)
    labels = np.fromfile(folder / "000000.label", np.uint32)
    kept = slice(None) if radius is None else np.linalg.norm(points[:, :2], axis=1) < radius
    points[kept].tofile(tmp_path / "000000.bin")
    labels[kept].tofile(tmp_path / "000000.label")
    sys.path.insert(0, str(EXAMPLES))
    try:
        from prepare_scans import describe
    finally:
        sys.path.remove(str(EXAMPLES))
    (tmp_path / "scans.pkl").write_bytes(pickle.dumps(describe(tmp_path, ["000000"])))
    config = Config.fromfile(EXAMPLES / "minkunet_semantickitti_scan.py")
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(tmp_path)
    return config


@needs_scans
def test_minkunet_learns(tmp_path):
    losses, runner = train(semantic_kitti(tmp_path, radius=10.0), tmp_path, steps=10)
    assert type(runner.model.backbone.conv_input[0][0]).__module__ == "kernelgraft_openmmlab.sparse_layers"
    assert np.isfinite(losses).all()
    assert losses[-2:].mean() < 0.8 * losses[:2].mean(), losses


@needs_scans
@pytest.mark.slow
def test_minkunet_knows_a_scan_by_heart(tmp_path):
    """Mean intersection over union on the whole scan over 0.9."""
    _, runner = train(semantic_kitti(tmp_path), tmp_path)
    found = runner.message_hub.get_scalar("val/miou").current()
    assert found > 0.9


@needs_scans
@pytest.mark.slow
def test_second_finds_the_objects_of_a_scan(tmp_path):
    config = kitti("second_kitti_scan.py")
    _, runner = train(config, tmp_path)
    path = tmp_path / "work" / f"iter_{config.train_cfg.max_iters}.pth"
    model = init_model(str(EXAMPLES / "second_kitti_scan.py"), str(path), "cpu")
    (found,), _ = inference_detector(model, [str(DATA / "lidar/kitti/000008.bin")])
    found = found.pred_instances_3d[found.pred_instances_3d.scores_3d > 0.3]
    truth = runner.train_dataloader.dataset[0]["data_samples"].gt_instances_3d
    overlaps = LiDARInstance3DBoxes.overlaps(truth.bboxes_3d, found.bboxes_3d)
    best = overlaps.max(1)
    assert len(truth.bboxes_3d) == 6
    assert (best.values > 0.5).all(), best
    assert torch.equal(found.labels_3d[best.indices], truth.labels_3d)
    assert len(found.bboxes_3d) <= len(truth.bboxes_3d) + 2
    shutil.rmtree(tmp_path / "work")
