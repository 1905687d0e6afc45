"""FlatFormer with CenterPoint's head on nuScenes: 0.32 m pillars, windows of 13 x 13, groups of 144.

Train: python -m kernelgraft.run SITE/mmdet3d/.mim/tools/train.py flatformer_centerpoint_nuscenes.py
"""

_base_ = "mmdet3d::centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py"

area = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
pillar = [0.32, 0.32, 8]
model = dict(
    data_preprocessor=dict(voxel_layer=dict(voxel_size=pillar, point_cloud_range=area)),
    pts_voxel_encoder=dict(voxel_size=pillar, point_cloud_range=area, feat_channels=[64, 128]),
    pts_middle_encoder=dict(
        _delete_=True,
        type="kernelgraft.FlatFormer",
        in_channels=128,
        grid_shape=(320, 320, 1),
        window_shape=(13, 13, 1),
        group_size=144,
        num_heads=8,
        num_blocks=2,
    ),
    pts_backbone=dict(in_channels=128, layer_nums=[3, 3], layer_strides=[1, 2], out_channels=[64, 128]),
    pts_neck=dict(in_channels=[64, 128], upsample_strides=[1, 2], out_channels=[128, 128]),
    pts_bbox_head=dict(in_channels=256, bbox_coder=dict(voxel_size=pillar[:2], out_size_factor=1)),
    train_cfg=dict(pts=dict(grid_size=[320, 320, 1], voxel_size=pillar, out_size_factor=1)),
    test_cfg=dict(pts=dict(voxel_size=pillar[:2], out_size_factor=1)),
)
