"""What vLLM asks of a packed checkpoint's quantization config: which layers run on our kernels.

Only what deciding needs is imported here; vLLM's layers are loaded when it builds a model, so that registering a method
stays cheap in each of its processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.models.utils import WeightsMapper


class PackedConfig(QuantizationConfig):
    """A checkpoint whose linear layers are packed integers, but for some.

    Args:
        modules_to_not_convert: names of layers that the checkpoint keeps in floating point, or parts of their paths.
    """

    def __init__(self, modules_to_not_convert: Sequence[str] = ()) -> None:
        super().__init__()
        self.modules_to_not_convert = list(modules_to_not_convert)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Add the layers whose weights in the file are not packed: ``config.json`` lists some, all or none of them."""
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        kinds: dict[str, set[str]] = {}
        for name in get_safetensors_params_metadata(model_name, revision=revision):
            module, _, kind = name.rpartition(".")
            kinds.setdefault(kind, set()).add(module)
        found = kinds.get("weight", set()) - kinds.get("qweight", set())
        self.modules_to_not_convert += sorted(found - set(self.modules_to_not_convert))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.modules_to_not_convert = hf_to_vllm_mapper.apply_list(self.modules_to_not_convert)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How ``layer`` is computed; None where it is computed as if the model were not quantized.

        Raises:
            ValueError: only a part of what ``layer`` fuses is quantized.
            NotImplementedError: ``layer`` holds quantized experts that are not run here; the message says why.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if isinstance(layer, RoutedExperts):
            return None if self.leaves_experts(prefix) else self.experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None  # embeddings, the output head and attention
        return UnquantizedLinearMethod() if self.leaves(prefix) else self.linear_method(prefix)

    def leaves(self, prefix: str) -> bool:
        """Whether the checkpoint keeps a layer in floating point.

        Whole parts of names are compared: "gate" is the router of a mixture and not "gate_proj".

        Raises:
            ValueError: that is so for some of the layers that this one fuses.
        """
        parent, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last, [last])
        found = {name: self._listed(f"{parent}.{name}") for name in fused}
        if self._listed(prefix) or all(found.values()):
            return True
        if any(found.values()):
            kept = ", ".join(name for name, listed in found.items() if listed)
            raise ValueError(f"{prefix}: the checkpoint keeps {kept} in floating point, but not all of {fused}")
        return False

    def leaves_experts(self, prefix: str) -> bool:
        """Whether the checkpoint keeps the experts at ``prefix`` in floating point: it may list them one by one."""
        return self._listed(prefix) or any(f".{prefix}." in f".{name}" for name in self.modules_to_not_convert)

    def _listed(self, name: str) -> bool:
        return any(f".{pattern}." in f".{name}." for pattern in self.modules_to_not_convert)

    @abstractmethod
    def linear_method(self, prefix: str) -> LinearMethodBase:
        """How a linear layer that the checkpoint holds quantized is loaded and computed."""

    @abstractmethod
    def experts_method(self, layer: torch.nn.Module, prefix: str) -> FusedMoEMethodBase:
        """How experts that the checkpoint holds quantized are loaded and computed.

        Raises:
            NotImplementedError: they are not run here; the message says why, and what runs them.
        """


def skipped_modules(config: Mapping[str, Any]) -> list[str]:
    """``modules_to_not_convert`` of a ``quantization_config``.

    Raises:
        ValueError: it is no list of names.
    """
    skipped = config.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ValueError(f"quantization_config has modules_to_not_convert = {skipped!r}, expected a list of names")
    return skipped
