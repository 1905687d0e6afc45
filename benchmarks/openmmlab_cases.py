"""Models of mmdet3d on real scans, on our ops and layers beside another provider of ``mmcv._ext``.

The peer is a Python file that defines functions of the names of mmcv's compiled ops, in plain PyTorch:
``$KERNELGRAFT_MMCV_PEER``. Importing this registers the cases.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .cases import Case, Prepared, Shape, UnavailableError, Variant, register
from .clouds import CLOUDS

PEER = os.environ.get("KERNELGRAFT_MMCV_PEER", "../shared/prototypes/openmmlab/mmcv_ext.py")
CONFIGS = {
    "kitti": "second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py",
    "nuscenes": "centerpoint/centerpoint_voxel01_second_secfpn_8xb4-cyclic-20e_nus-3d.py",
    "semantickitti": "minkunet/minkunet34_w32_spconv_8xb2-laser-polar-mix-3x_semantickitti.py",
}


@functools.cache
def _peer() -> ModuleType:
    path = Path(PEER)
    if not path.is_file():
        raise UnavailableError(f"{path} is not there: set KERNELGRAFT_MMCV_PEER to a file with mmcv's functions")
    spec = importlib.util.spec_from_file_location("mmcv_peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def peer_ops() -> Iterator[None]:
    """Inside, mmcv's ops are the peer's."""
    from kernelgraft_openmmlab.ext import NAMES

    theirs = {name: getattr(_peer(), name) for name in NAMES if hasattr(_peer(), name)}
    with mock.patch.dict(vars(sys.modules["mmcv._ext"]), theirs):
        yield


def _our_layers() -> contextlib.AbstractContextManager[object]:
    import kernelgraft

    return kernelgraft.load_plugin("sparse-conv", host="mmcv")


def _load() -> None:
    if importlib.util.find_spec("mmdet3d") is None:
        raise UnavailableError("mmdet3d is not installed: see requirements/openmmlab.txt")
    import kernelgraft

    kernelgraft.load_plugin("mmcv")
    torch.set_flush_denormal(True)  # random weights: nothing of what is measured should be denormal


def _models(name: str) -> tuple[Any, Any]:
    """The shipped model with mmcv's layers, and with ours and the same weights."""
    _load()
    plain = _build(name)
    with _our_layers():
        ours = _build(name)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def _build(name: str) -> Any:
    import mmdet3d
    from mmdet3d.apis import init_model

    torch.manual_seed(0)
    model = init_model(str(Path(mmdet3d.__file__).parent / ".mim/configs" / CONFIGS[name]), None, "cpu")
    for layer in model.modules():
        for weight in layer.parameters(recurse=False):
            if weight.dim() > 1:  # the configs' own make activations vanish
                sparse = type(layer).__name__.startswith(("Sparse", "SubM"))
                summands = weight.numel() // weight.shape[-1 if sparse else 0]
                torch.nn.init.normal_(weight, std=(2 / summands) ** 0.5)
    return model


def _points(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    cloud = CLOUDS[name]
    path = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / cloud.path
    if not path.is_file():
        raise UnavailableError(f"{path} is not there: set KERNELGRAFT_TEST_DATA")
    return np.fromfile(path, np.float32).reshape(-1, cloud.columns)


def _sample(name: str) -> dict[str, Any]:
    """A collated batch of one scan."""
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes, PointData

    sample = Det3DDataSample(metainfo={"box_type_3d": LiDARInstance3DBoxes, "box_mode_3d": 0})
    sample.gt_pts_seg, sample.eval_ann_info = PointData(), {}
    return {"inputs": {"points": [torch.from_numpy(_points(name))]}, "data_samples": [sample]}


def _passes(name: str, outputs: Callable[[Any, list[Any]], Tensor]) -> Prepared:
    plain, ours = _models(name)
    data = _sample(name)
    head = "bbox_head" if name == "kitti" else "decode_head"

    def run(model: Any) -> Tensor:
        seen: list[Any] = []
        hook = getattr(model, head).register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        try:
            with torch.no_grad():
                found = model.test_step({**data, "inputs": {"points": list(data["inputs"]["points"])}})
        finally:
            hook.remove()
        return outputs(found, seen)

    return _prepared(functools.partial(run, plain), functools.partial(run, ours))


def _prepared(plain: Callable[[], Tensor], ours: Callable[[], Tensor]) -> Prepared:
    with peer_ops():
        reference = plain().double()
    return Prepared(
        reference,
        {
            "plain torch provider": Variant(plain, 1e-3, "torch", "float32", context=peer_ops),
            "kernelgraft provider": Variant(plain, 1e-3, "cpu", "float32"),
            "kernelgraft layers": Variant(ours, 1e-3, "cpu", "float32", context=_our_layers),
        },
    )


def _prepare_second(shape: Shape) -> Prepared:
    """From points to boxes: voxels, sparse encoder, dense backbone and head, rotated suppression."""
    return _passes("kitti", lambda found, seen: torch.cat([each.flatten() for each in seen[0][0] + seen[0][1]]))


def _prepare_encoder(name: str, prefix: str, shape: Shape) -> Prepared:
    """A sparse encoder alone, from voxel features to the picture seen from above."""
    plain, ours = _models(name)
    data = plain.data_preprocessor(_sample(name), False)["inputs"]["voxels"]
    encode = getattr(plain, f"{prefix}voxel_encoder")
    with torch.no_grad():
        features = encode(data["voxels"], data["num_points"], data["coors"])

    def run(encoder: Any) -> Tensor:
        with torch.no_grad():
            # Tensors of their own, as every scan has: nothing is remembered from the pass before.
            out: Tensor = encoder(features.clone(), data["coors"].clone(), 1)
            return out

    encoders = (getattr(model, f"{prefix}middle_encoder") for model in (plain, ours))
    return _prepared(*(functools.partial(run, encoder) for encoder in encoders))


def _prepare_minkunet(shape: Shape) -> Prepared:
    """From points to the classes of all points."""
    return _passes("semantickitti", lambda found, seen: found[0].pts_seg_logits.pts_seg_logits)


for _name, _prepare in (
    ("mmdet3d_second", _prepare_second),
    ("mmdet3d_second_encoder", functools.partial(_prepare_encoder, "kitti", "")),
    ("mmdet3d_centerpoint_encoder", functools.partial(_prepare_encoder, "nuscenes", "pts_")),
    ("mmdet3d_minkunet34", _prepare_minkunet),
):
    register(Case(_name, "mmcv", "cpu", "plain torch provider", ({},), _prepare))
