"""QoQ checkpoints, ``quant_method: "qoq"``, in ``from_pretrained`` on kernelgraft's W4A8 kernels."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto

from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.w4a8.linear import W4A8Linear
from kernelgraft_core.runtime.patching import Patches

from .packed_quantizer import PackedConfig, PackedQuantizer
from .qoq_cache import QoQCache

METHOD = Qoq.label
CPU_WEIGHTS = ("int4", "int8")


class QoqInTransformers:
    """What ``load_plugin("qoq")`` gives a script to work with."""

    QoQCache = QoQCache


def graft(patches: Patches, cpu_weight: str = "int4") -> QoqInTransformers:
    """Make QoQ checkpoints load; all changes are recorded in ``patches``.

    Args:
        cpu_weight: what layers keep on a CPU, see :class:`~kernelgraft_core.quant.w4a8.linear.W4A8Linear`.

    Raises:
        ValueError: ``cpu_weight`` is neither ``"int4"`` nor ``"int8"``.
    """
    if cpu_weight not in CPU_WEIGHTS:
        raise ValueError(f"cpu_weight is {cpu_weight!r}, expected one of {CPU_WEIGHTS}")
    if cpu_weight != W4A8Linear.cpu_weight:
        patches.attr(W4A8Linear, "cpu_weight", cpu_weight)
    patches.item(auto.AUTO_QUANTIZER_MAPPING, METHOD, QoqQuantizer)
    patches.item(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, QoqCheckpointConfig)
    return QoqInTransformers()


class QoqCheckpointConfig(PackedConfig):
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
        self.bits, self.group_size, self.zero, self.act_bits, self.kv = bits, group_size, zero, act_bits, kv
        super().__init__(quant_method, modules_to_not_convert, format_version, unknown)


class QoqQuantizer(PackedQuantizer):
    """Checkpoints of 4-bit weights for 8-bit activations."""

    layer_type = W4A8Linear
