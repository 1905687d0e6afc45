"""Multi-scale deformable attention on a CPU: mmcv samples level by level there, with a kernel we do it at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.patching import Patches

from .rebinding import replace_everywhere


def _repair(patches: Patches, module: ModuleType) -> None:
    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(theirs)
        def attend(
            value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
        ) -> Tensor:
            if value.device.type != "cpu" or torch._C._get_tracing_state() or torch.onnx.is_in_onnx_export():
                found: Tensor = theirs(value, value_spatial_shapes, sampling_locations, attention_weights)
                return found
            from kernelgraft_core.vision.deform_attention.ops import deform_attention

            sizes = torch.as_tensor(value_spatial_shapes, dtype=torch.int64)
            ends = sizes.prod(1).cumsum(0)
            starts = torch.cat((ends.new_zeros(1), ends[:-1]))
            return deform_attention(value, sizes, starts, sampling_locations, attention_weights)

        return attend

    replace_everywhere(patches, module, "multi_scale_deformable_attn_pytorch", make)


REPAIRS = {"mmcv.ops.multi_scale_deform_attn": _repair}
