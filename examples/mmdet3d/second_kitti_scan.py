"""SECOND as mmdet3d ships it, trained on a single KITTI scan until it finds the objects of that scan.

python -m kernelgraft.run SITE/mmdet3d/.mim/tools/train.py second_kitti_scan.py --cfg-options \
    train_dataloader.dataset.data_root=data/kitti
"""

_base_ = "mmdet3d::second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py"

# Our layers in place of SubMConv3d and SparseConv3d; without this line mmcv's run, on kernelgraft's ops.
custom_imports = dict(imports=["kernelgraft.openmmlab"], allow_failed_imports=False)

steps = 110
# Statistics that a few steps suffice for: the shipped momentum of 0.01 wants hundreds.
norm = dict(eps=1e-3, momentum=0.2)
model = dict(
    middle_encoder=dict(norm_cfg=dict(type="BN1d", **norm)),
    backbone=dict(norm_cfg=dict(type="BN", **norm)),
    neck=dict(norm_cfg=dict(type="BN", **norm)),
)
metainfo = dict(classes=["Pedestrian", "Cyclist", "Car"])
scan = dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4)
area = [0, -40, -3, 70.4, 40, 1]

train_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=False),
    dataset=dict(
        type="KittiDataset",
        data_root="data/kitti",
        ann_file="kitti_infos_train.pkl",
        data_prefix=dict(pts=""),
        metainfo=metainfo,
        modality=dict(use_lidar=True, use_camera=False),
        box_type_3d="LiDAR",
        pipeline=[
            scan,
            dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
            dict(type="PointsRangeFilter", point_cloud_range=area),
            dict(type="ObjectRangeFilter", point_cloud_range=area),
            dict(type="Pack3DDetInputs", keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
        ],
    ),
)
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=steps, val_interval=steps + 1)
val_cfg = val_dataloader = val_evaluator = None
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [dict(type="OneCycleLR", eta_max=2e-3, total_steps=steps, by_epoch=False)]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10), checkpoint=dict(type="CheckpointHook", interval=steps, by_epoch=False)
)
log_processor = dict(_delete_=True, type="LogProcessor", window_size=10, by_epoch=False)
