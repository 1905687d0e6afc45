"""What the section ``mmcv`` does with mmdet3d: run detectors on a scan, train one, look for objects.

These functions run in a process of their own. mmengine changes the process it trains in for good (how multiprocessing
starts, seeds, loggers that hold stdout, the scope of its registries), and mmcv's modules keep the ops that they were
imported with.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .scene import Scan

AREA = (0.0, -39.68, -3.0, 69.12, 39.68, 1.0)
"""Where the trained detector looks, in metres: the smallest x, y, z, then the largest."""
LEAST_SCORE = 0.3
LEAST_OVERLAP = 0.5
_PILLAR = [0.32, 0.32, 4.0]
_RATE = 3e-3
# A few dozen steps have to suffice for the running statistics: the shipped momentum of 0.01 wants hundreds.
_NORM = {"eps": 1e-3, "momentum": 0.2}
_BASE = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"
# The model of examples/mmdet3d/flatformer_kitti.py, over the same base; only the momentum differs.
_FLATFORMER = {
    "data_preprocessor.voxel_layer": {
        "voxel_size": _PILLAR,
        "point_cloud_range": [*AREA],
        "max_voxels": [16000, 40000],
    },
    "voxel_encoder": {
        "voxel_size": _PILLAR,
        "point_cloud_range": [*AREA],
        "feat_channels": [64, 128],
        "norm_cfg": {"type": "BN1d", **_NORM},
    },
    "middle_encoder": {
        "_delete_": True,
        "type": "kernelgraft.FlatFormer",
        "in_channels": 128,
        "grid_shape": (216, 248, 1),
        "window_shape": (9, 9, 1),
        "group_size": 69,
        "num_heads": 8,
        "num_blocks": 2,
    },
    "backbone": {
        "in_channels": 128,
        "layer_nums": [3, 3],
        "layer_strides": [1, 2],
        "out_channels": [64, 128],
        "norm_cfg": {"type": "BN", **_NORM},
    },
    "neck": {
        "in_channels": [64, 128],
        "upsample_strides": [1, 2],
        "out_channels": [128, 128],
        "norm_cfg": {"type": "BN", **_NORM},
    },
    "bbox_head": {"in_channels": 256, "feat_channels": 256},
}

_report: Callable[[int, int, str], None]


def begin(log: Path, queue: Any) -> None:
    """Set this process up: what is printed goes to the file ``log``, progress to ``queue``."""
    global _report
    file = log.open("w", buffering=1, encoding="utf-8")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file

    def report(done: int, total: int, detail: str) -> None:
        queue.put((done, total, detail))

    _report = report


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; the log has the traceback of what it raises."""
    try:
        return function(*arguments)
    except Exception:
        traceback.print_exc()
        raise


def graft() -> dict[str, str]:
    """Load the plugins; the versions of what they are grafted onto.

    Raises:
        KernelgraftError: a host is missing or outside the tested range.
    """
    import torch

    import kernelgraft

    kernelgraft.load_plugin("mmcv")
    kernelgraft.load_plugin("sparse-conv", host="mmcv")
    # Random weights let some activations fade into denormal numbers, which take a CPU a hundred times as long.
    torch.set_flush_denormal(True)
    import mmcv
    import mmdet3d
    import mmdet3d.apis
    import mmengine

    return {module.__name__: module.__version__ for module in (mmengine, mmcv, mmdet3d)}


def measure(config: str, path: Path, device: str) -> dict[str, Any]:
    """Run a model that mmdet3d ships, with random weights, twice on the scan in a file; the second pass is timed.

    Args:
        config: its path among mmdet3d's configs.
        path: float32, as many columns as the config loads.

    Returns:
        ``voxels``, ``parameters`` and ``seconds``, these from the file to boxes or classes.
    """
    import torch
    from mmdet3d.apis import init_model
    from mmengine.hub import get_config

    torch.manual_seed(0)
    model = init_model(get_config(f"mmdet3d::{config}"), None, device)
    for layer in model.modules():
        for weight in layer.parameters(recurse=False):
            if weight.dim() > 1:  # the configs' own make activations vanish
                # Dense layers have outputs first, sparse ones last.
                last = weight.dim() == 3 or type(layer).__name__.startswith(("Sparse", "SubM"))
                summands = weight.numel() // weight.shape[-1 if last else 0]
                torch.nn.init.normal_(weight, std=(2 / summands) ** 0.5)
    return _look(model, path)[0]


def train(scan: Scan, path: Path, steps: int, work: Path, device: str) -> dict[str, Any]:
    """Train a small FlatFormer on one scan through mmengine's Runner, then let it look for the objects of that scan.

    Args:
        path: a file with the points of ``scan``.
        work: a folder for the Runner.

    Returns:
        What :func:`measure` does; ``losses`` of all steps and the median of their ``step_seconds``; the ``boxes`` that
        were found, ``(K, 7)`` as in :class:`Scan`, with their ``scores`` and ``labels``; and ``overlaps``, ``(M, K)``,
        intersection over union seen from above of each object with each of them.
    """
    import torch
    from mmcv.ops import box_iou_rotated
    from mmdet3d.structures import LiDARInstance3DBoxes
    from mmengine.dataset import InfiniteSampler, pseudo_collate
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    config = flatformer()
    data: Any = [_labelled(scan)]  # a list is a dataset, too
    runner = Runner(
        model=config.model,
        work_dir=str(work),
        train_dataloader=DataLoader(data, sampler=InfiniteSampler(data, shuffle=False), collate_fn=pseudo_collate),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": steps, "val_interval": steps + 1},
        optim_wrapper={
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": _RATE, "weight_decay": 0.01},
            "clip_grad": {"max_norm": 10},
        },
        param_scheduler=[{"type": "OneCycleLR", "eta_max": _RATE, "total_steps": steps, "by_epoch": False}],
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}, "checkpoint": None},
        log_processor={"type": "LogProcessor", "window_size": 1, "by_epoch": False},
        default_scope="mmdet3d",
        randomness={"seed": 0},
    )
    runner.register_hook(_progress(steps))
    runner.train()
    model = runner.model.to(device).eval()
    model.cfg = config
    facts, result = _look(model, path)
    found = result.pred_instances_3d
    found = found[found.scores_3d > LEAST_SCORE]
    truth = LiDARInstance3DBoxes(torch.from_numpy(scan.boxes))
    scalars = {name: runner.message_hub.get_scalar(f"train/{name}").data[0] for name in ("loss", "time")}
    return facts | {
        "losses": [float(loss) for loss in scalars["loss"]],
        "step_seconds": float(np.median(scalars["time"])),
        "boxes": found.bboxes_3d.tensor.cpu().numpy(),
        "scores": found.scores_3d.cpu().numpy(),
        "labels": found.labels_3d.cpu().numpy(),
        "overlaps": box_iou_rotated(truth.bev, found.bboxes_3d.bev.cpu()).numpy(),
    }


def flatformer() -> Any:
    """mmengine's ``Config`` of the small FlatFormer, with mmdet3d's pipelines for KITTI."""
    from mmengine.hub import get_config

    config = get_config(_BASE)
    config.merge_from_dict({f"model.{part}": changes for part, changes in _FLATFORMER.items()})
    return config


def _look(model: Any, path: Path) -> tuple[dict[str, Any], Any]:
    """Numbers of a model, the time of its second pass, and what it then gives."""
    import torch
    from mmdet3d.apis import inference_detector, inference_segmentor

    infer = inference_segmentor if hasattr(model, "decode_head") else inference_detector
    voxels = []

    def count(module: Any, inputs: Any, outputs: Any) -> None:
        voxels.append(len(outputs["inputs"]["voxels"]["coors"]))

    hook = model.data_preprocessor.register_forward_hook(count)
    try:
        for _ in range(2):
            started = time.perf_counter()
            result, _ = infer(model, str(path))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    finally:
        hook.remove()
    parameters = sum(weight.numel() for weight in model.parameters())
    return {"voxels": voxels[-1], "parameters": parameters, "seconds": seconds}, result


def _labelled(scan: Scan) -> dict[str, Any]:
    """A scan as mmdet3d's datasets give it to a model."""
    import torch
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    sample = Det3DDataSample(metainfo={"box_type_3d": LiDARInstance3DBoxes})
    sample.gt_instances_3d = InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(torch.from_numpy(scan.boxes)), labels_3d=torch.from_numpy(scan.labels)
    )
    return {"inputs": {"points": torch.from_numpy(scan.points)}, "data_samples": sample}


def _progress(steps: int) -> Any:
    """A hook of mmengine that reports every step and its loss."""
    from mmengine.hooks import Hook

    class Progress(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            _report(runner.iter + 1, steps, f"loss {float(outputs['loss']):.2f}")

    return Progress()
