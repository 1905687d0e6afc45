"""A small FlatFormer on KITTI: PointPillars as mmdet3d ships it, with attention in place of the scatter.

Train: python -m kernelgraft.run SITE/mmdet3d/.mim/tools/train.py flatformer_kitti.py
"""

_base_ = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"

area = [0, -39.68, -3, 69.12, 39.68, 1]
pillar = [0.32, 0.32, 4]
model = dict(
    data_preprocessor=dict(voxel_layer=dict(voxel_size=pillar, point_cloud_range=area, max_voxels=(16000, 40000))),
    voxel_encoder=dict(voxel_size=pillar, point_cloud_range=area, feat_channels=[64, 128]),
    middle_encoder=dict(
        _delete_=True,
        type="kernelgraft.FlatFormer",
        in_channels=128,
        grid_shape=(216, 248, 1),
        window_shape=(9, 9, 1),
        group_size=69,
        num_heads=8,
        num_blocks=2,
    ),
    backbone=dict(in_channels=128, layer_nums=[3, 3], layer_strides=[1, 2], out_channels=[64, 128]),
    neck=dict(in_channels=[64, 128], upsample_strides=[1, 2], out_channels=[128, 128]),
    bbox_head=dict(in_channels=256, feat_channels=256),
)
