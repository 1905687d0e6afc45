"""mmdet and mmsegmentation on the same ops: shipped configs with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
import mmdet
import mmseg
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmseg.apis import inference_model, init_model

pytestmark = pytest.mark.usefixtures("mmcv_plugin")
PICTURE = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


def config_of(package, name):
    config = Config.fromfile(Path(package.__file__).parent / ".mim/configs" / name)
    config.model.backbone.init_cfg = None
    if "pretrained" in config.model:
        config.model.pretrained = None
    return config


@pytest.mark.parametrize(
    "name",
    [
        "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
        "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py",
    ],
)
def test_detectors_of_mmdet(name):
    torch.manual_seed(0)
    config = config_of(mmdet, name)
    config.test_dataloader.dataset.pipeline[1].scale = (128, 96)
    config.model.test_cfg.rcnn.score_thr = 0.0
    model = init_detector(config, None, palette="random", device="cpu")
    found = inference_detector(model, PICTURE).pred_instances
    assert len(found.bboxes) > 0
    assert found.bboxes.isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py", "psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024.py"],
)
def test_segmentors_of_mmseg(name):
    torch.manual_seed(0)
    config = config_of(mmseg, name)
    config.test_pipeline[1].scale = (128, 96)
    if "psanet" in name:
        config.model.decode_head.mask_size = (12, 16)
    from mmengine.model import revert_sync_batchnorm

    model = revert_sync_batchnorm(init_model(config, None, "cpu"))
    found = inference_model(model, PICTURE)
    assert found.pred_sem_seg.data.shape == (1, *PICTURE.shape[:2])
    assert found.seg_logits.data.isfinite().all()
