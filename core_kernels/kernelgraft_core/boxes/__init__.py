"""Boxes of object detection: overlaps, suppression, and the points in them."""

from .nms.ops import nms, nms_match, quad_nms, rotated_nms, soft_nms
from .overlap.ops import box_iou, boxes_overlap_bev, quad_iou, rotated_iou
from .points.ops import first_box_of_points, points_in_boxes, points_in_polygons
from .vertices.ops import sort_overlap_vertices

__all__ = [
    "box_iou",
    "boxes_overlap_bev",
    "first_box_of_points",
    "nms",
    "nms_match",
    "points_in_boxes",
    "points_in_polygons",
    "quad_iou",
    "quad_nms",
    "rotated_iou",
    "rotated_nms",
    "soft_nms",
    "sort_overlap_vertices",
]
