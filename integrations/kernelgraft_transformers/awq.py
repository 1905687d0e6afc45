"""AWQ checkpoints in ``AutoModelForCausalLM.from_pretrained`` on kernelgraft's kernels, on CPU and GPU.

Transformers itself loads them through gptqmodel. Its ``register_quantizer`` refuses a name that it has, so the entry of
its table is replaced, and put back when the plugin is unloaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import auto

from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.w4a16.linear import AwqLinear
from kernelgraft_core.runtime.errors import CheckpointError
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
    """Checkpoints in AutoAWQ's GEMM layout, as :class:`AwqLinear` layers."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        config = self.quantization_config
        format_name = str(getattr(config.format, "value", config.format))
        for key, value, wanted in (
            ("bits", config.bits, 4),
            ("zero_point", config.zero_point, True),
            ("version", format_name, "gemm"),
        ):
            if value != wanted:
                help_ = ", which `kernelgraft convert IN OUT --to awq` makes of it" if key == "version" else ""
                raise CheckpointError(
                    f"quantization_config has {key} = {value!r}; kernelgraft's AWQ layers run {key} = {wanted!r}{help_}"
                )

    @property
    def layout(self) -> Layout:
        return find_layout({"quant_method": "awq", "group_size": self.quantization_config.group_size})

    def new_layer(self, linear: nn.Linear) -> AwqLinear:
        return AwqLinear(
            linear.in_features,
            linear.out_features,
            self.quantization_config.group_size,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
