"""Checkpoints in kernelgraft's own format inside vLLM: the quantization config that ``config.json`` selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import AWQ_METHOD
from .awq import KernelgraftAWQConfig
from .packed_config import skipped_modules

if TYPE_CHECKING:
    from torch.nn import Module
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase

_GROUP_SIZES = (32, 64, 128, -1)


class KernelgraftNativeConfig(KernelgraftAWQConfig):
    """A checkpoint whose tensors are those that the kernels read.

    Args:
        bits: 3 or 4.
        group_size: weights along K that share a scale, or -1 for one group per row.
        symmetric: whether the zero point is ``2**(bits - 1)`` everywhere and not stored.
        modules_to_not_convert: names of layers that the checkpoint keeps in floating point, or parts of their paths.
    """

    def __init__(self, bits: int, group_size: int, symmetric: bool, modules_to_not_convert: Sequence[str] = ()) -> None:
        super().__init__(group_size, modules_to_not_convert)
        self.bits = bits
        self.symmetric = symmetric

    @staticmethod
    def read(config: Mapping[str, Any]) -> KernelgraftNativeConfig:
        """Read ``quantization_config`` of ``config.json``.

        Raises:
            ValueError: a setting is missing or not one that these kernels run; the message holds the value.
        """
        allowed: dict[str, tuple[Any, ...]] = {
            "format_version": (1,),
            "bits": (3, 4),
            "group_size": _GROUP_SIZES,
            "symmetric": (True, False),
        }
        for key, values in allowed.items():
            value = config.get(key)
            if type(value) is not type(values[0]) or value not in values:
                raise ValueError(
                    f"quantization_config has {key} = {value!r}; {AWQ_METHOD} supports {', '.join(map(repr, values))}"
                )
        skipped = skipped_modules(config)
        return KernelgraftNativeConfig(config["bits"], config["group_size"], config["symmetric"], skipped)

    def linear_method(self, prefix: str) -> LinearMethodBase:
        from .native_linear import KernelgraftNativeLinearMethod

        return KernelgraftNativeLinearMethod(self.bits, self.group_size, self.symmetric, prefix)

    def experts_method(self, layer: Module, prefix: str) -> FusedMoEMethodBase:
        from kernelgraft_core.quant.formats.native import Native

        from .experts import KernelgraftExpertsMethod

        layout = Native(self.bits, self.group_size, self.symmetric)
        return KernelgraftExpertsMethod(layer, layout, k_first=False, prefix=prefix)
