"""QoQ checkpoints, ``quant_method: "qoq"``, inside vLLM: the quantization config that ``config.json`` selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import QOQ_METHOD
from .packed_config import PackedConfig, skipped_modules

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase

    from kernelgraft_core.quant.formats.qoq import Qoq


class KernelgraftQoQConfig(PackedConfig):
    """A checkpoint of 4-bit weights for 8-bit activations. Its ``kv`` settings are a note: users choose the cache.

    Args:
        layout: how the layers are stored.
        modules_to_not_convert: names of layers that the checkpoint keeps in floating point, or parts of their paths.
    """

    def __init__(self, layout: Qoq, modules_to_not_convert: Sequence[str] = ()) -> None:
        super().__init__(modules_to_not_convert)
        self.layout = layout

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layout}, modules_to_not_convert={self.modules_to_not_convert})"

    def get_name(self) -> str:
        return QOQ_METHOD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KernelgraftQoQConfig:
        """Read ``quantization_config`` of ``config.json``.

        Raises:
            ValueError: the checkpoint is of another method, or a setting is one that is not run; the message holds the
                value.
        """
        from kernelgraft_core.quant.formats.qoq import Qoq
        from kernelgraft_core.quant.formats.registry import find_layout

        layout = find_layout(config)
        if not isinstance(layout, Qoq):
            raise ValueError(f"quantization_config has quant_method = {config['quant_method']!r}, expected 'qoq'")
        return cls(layout, skipped_modules(config))

    def linear_method(self, prefix: str) -> LinearMethodBase:
        from .qoq_linear import KernelgraftQoQLinearMethod

        return KernelgraftQoQLinearMethod(self.layout, prefix)

    def experts_method(self, layer: torch.nn.Module, prefix: str) -> FusedMoEMethodBase:
        raise NotImplementedError(
            f"{prefix}: experts with weights of 4 and activations of 8 bits are not written for vLLM; Transformers "
            "runs them with the plugin 'qoq'"
        )
