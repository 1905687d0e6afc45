"""Point clouds: voxels of points, samples, neighbours, groups of features, and points in boxes."""

from .grouping import (
    assign_scores,
    chamfer_distance,
    gather_points,
    group_stacked_points,
    three_interpolate,
)
from .neighbors.ops import ball_query, knn, three_nn
from .reduce.ops import VoxelGroups, reduce_groups, scatter_points, voxel_groups
from .roi_pool.ops import roi_aware_pool, roi_point_pool
from .sampling.ops import furthest_point_sampling, furthest_point_sampling_with_distances
from .voxelize.ops import dynamic_voxelize, hard_voxelize, hard_voxelize_into

__all__ = [
    "VoxelGroups",
    "assign_scores",
    "ball_query",
    "chamfer_distance",
    "dynamic_voxelize",
    "furthest_point_sampling",
    "furthest_point_sampling_with_distances",
    "gather_points",
    "group_stacked_points",
    "hard_voxelize",
    "hard_voxelize_into",
    "knn",
    "reduce_groups",
    "roi_aware_pool",
    "roi_point_pool",
    "scatter_points",
    "three_interpolate",
    "three_nn",
    "voxel_groups",
]
