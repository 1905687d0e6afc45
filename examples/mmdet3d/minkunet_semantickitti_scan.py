"""A MinkUNet of mmdet3d's, trained on a single SemanticKITTI scan until it knows the classes of its points.

python prepare_scans.py data/semantickitti 000000
python -m kernelgraft.run SITE/mmdet3d/.mim/tools/train.py minkunet_semantickitti_scan.py
"""

_base_ = "mmdet3d::minkunet/minkunet34_w32_spconv_8xb2-laser-polar-mix-3x_semantickitti.py"

custom_imports = dict(imports=["kernelgraft.openmmlab"], allow_failed_imports=False)

steps = 220
# Rare classes count for more: a pole has a thousandth of the points of a road.
weights = [1, 5, 5, 5, 5, 5, 5, 5, 1, 2, 1, 5, 1, 5, 1, 5, 2, 5, 5]
model = dict(
    backbone=dict(
        base_channels=16,
        encoder_channels=[16, 32, 64, 128],
        encoder_blocks=[2, 2, 2, 2],
        decoder_channels=[128, 64, 48, 48],
        decoder_blocks=[2, 2, 2, 2],
    ),
    decode_head=dict(
        channels=48,
        loss_decode=dict(type="mmdet.CrossEntropyLoss", class_weight=weights, avg_non_ignore=True),
    ),
)
points = dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4)
labels = dict(
    type="LoadAnnotations3D",
    with_bbox_3d=False,
    with_label_3d=False,
    with_seg_3d=True,
    seg_3d_dtype="np.int32",
    seg_offset=2**16,
    dataset_type="semantickitti",
)
pack = dict(type="Pack3DDetInputs", keys=["points", "pts_semantic_mask"])
scans = dict(
    type="SemanticKittiDataset",
    data_root="data/semantickitti",
    ann_file="scans.pkl",
    metainfo={{_base_.metainfo}},
    modality=dict(use_lidar=True, use_camera=False),
    ignore_index=19,
    pipeline=[points, labels, dict(type="PointSegClassMapping"), pack],
)
train_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=False),
    dataset=scans,
)
val_dataloader = test_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(test_mode=True, **scans),
)
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=5e-3, weight_decay=1e-4))
param_scheduler = [dict(type="OneCycleLR", eta_max=8e-3, total_steps=steps, by_epoch=False)]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(_delete_=True, type="CheckpointHook", interval=steps, by_epoch=False),
)
log_processor = dict(_delete_=True, type="LogProcessor", window_size=10, by_epoch=False)
