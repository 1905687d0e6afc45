"""kernelgraft's own checkpoint format, ``quant_method: "kernelgraft_awq"``, in ``from_pretrained``."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.runtime.errors import CheckpointError

from .packed_quantizer import PackedQuantizer

METHOD = Native.label


class KernelgraftAwqConfig(QuantizationConfigMixin):
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
        if unknown:
            raise CheckpointError(f"quantization_config has {', '.join(sorted(unknown))}, unknown to {METHOD}")
        listed = modules_to_not_convert
        if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
            raise CheckpointError(
                f"quantization_config has modules_to_not_convert = {listed!r}, expected a list of names"
            )
        self.quant_method = quant_method
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.modules_to_not_convert, self.format_version = listed, format_version
        self.layout()

    def layout(self) -> Layout:
        """How the layers are stored."""
        return find_layout(self.to_dict())


class NativeQuantizer(PackedQuantizer):
    """Checkpoints in kernelgraft's own format, 3 and 4 bits."""
