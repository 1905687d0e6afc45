"""FlatFormer with CenterPoint's head on Waymo, as the paper has it: 0.32 m pillars on a grid of 468 x 468.

Train: python -m kernelgraft.run SITE/mmdet3d/.mim/tools/train.py flatformer_centerpoint_waymo.py
"""

_base_ = [
    "mmdet3d::_base_/datasets/waymoD5-3d-3class.py",
    "mmdet3d::_base_/models/centerpoint_pillar02_second_secfpn_nus.py",
    "mmdet3d::_base_/schedules/cyclic-20e.py",
    "mmdet3d::_base_/default_runtime.py",
]

area = [-74.88, -74.88, -2, 74.88, 74.88, 4]
limits = [-80, -80, -10.0, 80, 80, 10.0]
pillar = [0.32, 0.32, 6]
norm = dict(eps=1e-3, momentum=0.01)
model = dict(
    data_preprocessor=dict(
        voxel_layer=dict(voxel_size=pillar, point_cloud_range=area, max_voxels=(60000, 80000), max_num_points=20)
    ),
    pts_voxel_encoder=dict(voxel_size=pillar, point_cloud_range=area, feat_channels=[64, 128]),
    pts_middle_encoder=dict(
        _delete_=True,
        type="kernelgraft.FlatFormer",
        in_channels=128,
        grid_shape=(468, 468, 1),
        window_shape=(13, 13, 1),
        group_size=144,
        num_heads=8,
        num_blocks=2,
    ),
    pts_backbone=dict(in_channels=128, layer_nums=[3, 3], layer_strides=[1, 2], out_channels=[64, 128]),
    pts_neck=dict(in_channels=[64, 128], upsample_strides=[1, 2], out_channels=[128, 128]),
    pts_bbox_head=dict(
        in_channels=256,
        tasks=[dict(num_class=3, class_names=["Car", "Pedestrian", "Cyclist"])],
        common_heads=dict(_delete_=True, reg=(2, 2), height=(1, 2), dim=(3, 2), rot=(2, 2)),
        bbox_coder=dict(
            voxel_size=pillar[:2], pc_range=area[:2], out_size_factor=1, code_size=7, post_center_range=limits
        ),
    ),
    train_cfg=dict(
        pts=dict(
            grid_size=[468, 468, 1],
            voxel_size=pillar,
            point_cloud_range=area,
            out_size_factor=1,
            code_weights=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        )
    ),
    test_cfg=dict(
        pts=dict(
            voxel_size=pillar[:2],
            pc_range=area[:2],
            out_size_factor=1,
            post_center_limit_range=limits,
            pre_max_size=4096,
            post_max_size=500,
            nms_thr=0.7,
        )
    ),
)
