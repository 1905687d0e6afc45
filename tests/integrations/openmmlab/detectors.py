"""Detectors and segmentors from the configs that mmdet3d ships, with weights that keep signals alive.

The initial weights of the configs make activations vanish: what then comes out of two runs is equal whatever they do.
"""

import tempfile
from pathlib import Path

import mmdet3d
import torch
from mmdet3d.apis import inference_detector, inference_segmentor, init_model

CONFIGS = Path(mmdet3d.__file__).parent / ".mim/configs"
EXAMPLES = Path(__file__).parents[3] / "examples/mmdet3d"
DETECTORS = {
    "second": (CONFIGS / "second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py", "kitti"),
    "pointpillars": (CONFIGS / "pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py", "kitti"),
    "centerpoint-pillar": (
        CONFIGS / "centerpoint/centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d.py",
        "nuscenes",
    ),
    "centerpoint-voxel": (
        CONFIGS / "centerpoint/centerpoint_voxel01_second_secfpn_8xb4-cyclic-20e_nus-3d.py",
        "nuscenes",
    ),
    "centerpoint-dcn": (
        CONFIGS / "centerpoint/centerpoint_voxel01_second_secfpn_head-dcn_8xb4-cyclic-20e_nus-3d.py",
        "nuscenes",
    ),
    "part-a2": (CONFIGS / "parta2/parta2_hv_secfpn_8xb2-cyclic-80e_kitti-3d-3class.py", "kitti"),
    "pv-rcnn": (CONFIGS / "pv_rcnn/pv_rcnn_8xb2-80e_kitti-3d-3class.py", "kitti"),
    "flatformer-kitti": (EXAMPLES / "flatformer_kitti.py", "kitti"),
    "flatformer-nuscenes": (EXAMPLES / "flatformer_centerpoint_nuscenes.py", "nuscenes"),
    "cylinder3d": (CONFIGS / "cylinder3d/cylinder3d_4xb4-3x_semantickitti.py", "semantickitti"),
    "minkunet": (
        CONFIGS / "minkunet/minkunet34_w32_spconv_8xb2-laser-polar-mix-3x_semantickitti.py",
        "semantickitti",
    ),
}
NEEDS_TORCHSPARSE = {
    "minkunet-torchsparse": (
        CONFIGS / "minkunet/minkunet34_w32_torchsparse_8xb2-laser-polar-mix-3x_semantickitti.py",
        "semantickitti",
    ),
    "minkunet-v2": (
        CONFIGS / "minkunet/minkunet34v2_w32_torchsparse_8xb2-amp-laser-polar-mix-3x_semantickitti.py",
        "semantickitti",
    ),
    "spvcnn": (CONFIGS / "spvcnn/spvcnn_w32_8xb2-amp-15e_semantickitti.py", "semantickitti"),
}
HEADS = ("bbox_head", "pts_bbox_head", "rpn_head", "points_encoder", "roi_head.bbox_head")


def build(config):
    """On the CPU, in eval mode."""
    torch.manual_seed(0)
    model = init_model(str(config), None, "cpu")
    for layer in model.modules():
        for weight in layer.parameters(recurse=False):
            if weight.dim() > 1:
                # Dense layers have outputs first, sparse ones of mmcv last, as torchsparse's ``kernel`` does.
                last = weight.dim() == 3 or type(layer).__name__.startswith(("Sparse", "SubM"))
                summands = weight.numel() // weight.shape[-1 if last else 0]
                torch.nn.init.normal_(weight, std=(2 / summands) ** 0.5)
    return model


def infer(model, *clouds):
    """The results of a batch, and what the heads gave: one list of tensors with the batch first."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda *arguments: seen.extend(_tensors(arguments[2])))
        for name, module in model.named_modules()
        if name in HEADS
    ]
    try:
        if hasattr(model, "decode_head"):  # these take files alone
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder) / f"{i}.bin" for i in range(len(clouds))]
                for path, cloud in zip(paths, clouds, strict=True):
                    path.write_bytes(cloud.tobytes())
                found, _ = inference_segmentor(model, list(map(str, paths)))
        else:
            found, _ = inference_detector(model, list(clouds))
    finally:
        for hook in hooks:
            hook.remove()
    for sample in found:
        if "pts_seg_logits" in sample:
            seen.append(sample.pts_seg_logits.pts_seg_logits)
    return found, seen


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        values = [each for name, each in value.items() if name != "keypoints"]  # these have the number of the sample
    else:
        values = value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in _tensors(each)]


def largest_difference(batch, first, second):
    """Of the same tensors from a batch of two and from two batches of one, relative to the largest value."""
    if not batch or len(first) != len(second):
        raise AssertionError(f"{len(batch)}, {len(first)} and {len(second)} tensors")
    if len(batch) == len(first):  # heads: samples are parts of one tensor
        pairs = [(both, torch.cat(parts)) for both, *parts in zip(batch, first, second, strict=True)]
    else:  # segmentors: one tensor for each sample
        pairs = list(zip(batch, [*first, *second], strict=True))
    worst = 0.0
    for together, alone in pairs:
        if together.shape != alone.shape:
            raise AssertionError(f"{tuple(together.shape)} in one batch, {tuple(alone.shape)} in two")
        scale = float(alone.abs().max()) if alone.numel() else 1.0
        if not 0 < scale < float("inf"):
            raise AssertionError(f"the outputs are at most {scale}: nothing is compared")
        worst = max(worst, float((together - alone).abs().max()) / scale)
    return worst
