"""kernelgraft's own checkpoint format, ``quant_method: "kernelgraft_awq"``, in ``from_pretrained``."""

from __future__ import annotations

from typing import Any

from kernelgraft_core.quant.formats.native import Native

from .packed_quantizer import PackedConfig, PackedQuantizer

METHOD = Native.label


class KernelgraftAwqConfig(PackedConfig):
    """``quantization_config`` of a checkpoint in kernelgraft's own format.

    Args:
        bits: 3 or 4.
        group_size: weights per scale along K; -1 is the whole row.
        symmetric: no zero points are stored; they are ``2 ** (bits - 1)``.
        modules_to_not_convert: names, or parts of paths, of what is stored unquantized; the output head is anyway.
        format_version: 1.

    Raises:
        CheckpointError: a value is none of these, or a setting unknown; the message names it.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = False,
        modules_to_not_convert: list[str] | None = None,
        format_version: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        super().__init__(quant_method, modules_to_not_convert, format_version, unknown)


class NativeQuantizer(PackedQuantizer):
    """Checkpoints in kernelgraft's own format, 3 and 4 bits."""
