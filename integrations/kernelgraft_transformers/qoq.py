"""QoQ checkpoints, ``quant_method: "qoq"``, in ``from_pretrained`` on kernelgraft's W4A8 kernels."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.w4a8.linear import W4A8Linear
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_core.runtime.patching import Patches

from .packed_quantizer import PackedQuantizer

METHOD = Qoq.label


def graft(patches: Patches) -> None:
    """Make QoQ checkpoints load; all changes are recorded in ``patches``."""
    patches.item(auto.AUTO_QUANTIZER_MAPPING, METHOD, QoqQuantizer)
    patches.item(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, QoqCheckpointConfig)


class QoqCheckpointConfig(QuantizationConfigMixin):
    """``quantization_config`` of a QoQ checkpoint.

    Args:
        bits: 4; act_bits: 8.
        group_size: weights along K that share a zero point; -1 is the whole row.
        zero: ``"pre"`` or ``"post"`` (:mod:`~kernelgraft_core.quant.formats.qoq`).
        kv: what is known of the key-value cache: its bits, and whether keys were smoothed for it.
        modules_to_not_convert: names, or parts of paths, of what is stored unquantized; the output head is anyway.
        format_version: 1.

    Raises:
        CheckpointError: a value is none of these, or a setting unknown; the message names it.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        zero: str = "pre",
        act_bits: int = 8,
        kv: dict[str, Any] | None = None,
        modules_to_not_convert: list[str] | None = None,
        format_version: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config has {', '.join(sorted(unknown))}, unknown to {METHOD}")
        self.quant_method = quant_method
        self.bits, self.group_size, self.zero, self.act_bits, self.kv = bits, group_size, zero, act_bits, kv
        self.modules_to_not_convert, self.format_version = modules_to_not_convert, format_version
        self.layout()

    def layout(self) -> Layout:
        """How the layers are stored."""
        return find_layout(self.to_dict())


class QoqQuantizer(PackedQuantizer):
    """Checkpoints of 4-bit weights for 8-bit activations."""

    def new_layer(self, linear: nn.Linear) -> W4A8Linear:
        return W4A8Linear(
            linear.in_features,
            linear.out_features,
            self.layout,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
