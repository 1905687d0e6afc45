"""AWQ checkpoints in ``AutoModelForCausalLM.from_pretrained`` on kernelgraft's kernels, on CPU and GPU.

Transformers itself loads them through gptqmodel. Its ``register_quantizer`` refuses a name that it has, so the entry of
its table is replaced, and put back when the plugin is unloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers import auto

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.layout import Layout, StoredTensor
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.quant.w4a16.linear import AwqLinear
from kernelgraft_core.runtime.patching import Patches

from .adapters import graft_adapters
from .native import METHOD, KernelgraftAwqConfig, NativeQuantizer
from .packed_quantizer import PackedQuantizer


def graft(patches: Patches) -> None:
    """Make AWQ checkpoints and those of kernelgraft's own format load here, and PEFT take their layers.

    All changes are recorded in ``patches``.
    """
    patches.item(auto.AUTO_QUANTIZER_MAPPING, "awq", AwqQuantizer)
    patches.item(auto.AUTO_QUANTIZER_MAPPING, METHOD, NativeQuantizer)
    patches.item(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, KernelgraftAwqConfig)
    graft_adapters(patches)


class AwqQuantizer(PackedQuantizer):
    """Checkpoints of AutoAWQ and llm-awq: those in the GEMM layout as :class:`AwqLinear` layers."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        self.find_layout({})

    def find_layout(self, stored: Mapping[str, StoredTensor]) -> Layout:
        config = self.quantization_config
        settings = {
            "quant_method": "awq",
            "bits": config.bits,
            "group_size": config.group_size,
            "zero_point": config.zero_point,
            "version": getattr(config.format, "value", config.format),
        }
        return find_layout(settings, stored)

    def new_layer(self, linear: nn.Linear) -> PackedLinear:
        if not isinstance(self.layout, Gemm):
            return super().new_layer(linear)
        return AwqLinear(
            linear.in_features,
            linear.out_features,
            self.layout.group_size,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
