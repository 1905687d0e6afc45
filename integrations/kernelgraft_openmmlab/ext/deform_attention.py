"""Multi-scale deformable attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelgraft_core.vision.deform_attention.ops import DEFORM_ATTENTION_BACKWARD, deform_attention
from kernelgraft_core.vision.precision import full_precision

__all__ = ("ms_deform_attn_backward", "ms_deform_attn_forward")


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    **_: Any,
) -> Tensor:
    levels = value_spatial_shapes.long(), value_level_start_index.long()
    with full_precision(value):  # mmcv has made all types that of the values, and expects it back
        return deform_attention(value, *levels, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    **_: Any,
) -> None:
    levels = value_spatial_shapes.long(), value_level_start_index.long()
    found = DEFORM_ATTENTION_BACKWARD(grad_output, value, *levels, sampling_locations, attention_weights)
    for target, each in zip((grad_value, grad_sampling_loc, grad_attn_weight), found, strict=True):
        target.copy_(each)
