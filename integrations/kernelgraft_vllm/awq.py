"""Which layers of an AutoAWQ checkpoint run on our kernels: the quantization config that vLLM asks.

Only what deciding needs is imported here; vLLM's layers are loaded when it builds a model, so that registering the
method stays cheap in each of its processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from . import AWQ_METHOD

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

_MISSING = object()


class KernelgraftAWQConfig(QuantizationConfig):
    """An AutoAWQ checkpoint in GEMM layout: 4 bits, asymmetric, one scale and zero point per group and column.

    Args:
        group_size: weights along K that share a scale, a multiple of 8, or -1 for one group per column.
        modules_to_not_convert: names of layers that the checkpoint keeps in floating point, or parts of their paths.
    """

    def __init__(self, group_size: int, modules_to_not_convert: Sequence[str] = ()) -> None:
        super().__init__()
        self.group_size = group_size
        self.modules_to_not_convert = list(modules_to_not_convert)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(group_size={self.group_size}, modules_to_not_convert={self.modules_to_not_convert})"
        )

    def get_name(self) -> str:
        return AWQ_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where AutoAWQ kept its settings before they moved into ``config.json``."""
        return ["quantize_config.json", "quant_config.json"]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KernelgraftAWQConfig:
        """Read ``quantization_config`` of ``config.json``, with the key names of AutoAWQ's old and new versions.

        Raises:
            ValueError: the checkpoint is not AWQ, or is of a kind that these kernels do not run; the message holds
                the value and what is supported.
        """
        if config.get("quant_method") == AWQ_METHOD:
            from .native import KernelgraftNativeConfig

            return KernelgraftNativeConfig.read(config)
        expected = (
            ("quant_method", _first(config, "quant_method", default="awq"), "awq"),
            ("version", _first(config, "version", "format", default="gemm"), "gemm"),
            ("bits", _first(config, "bits", "w_bit"), 4),
            ("zero_point", _first(config, "zero_point", default=True), True),
            ("lm_head", _first(config, "lm_head", default=False), False),
        )
        for key, value, supported in expected:
            comparable = value.lower() if isinstance(value, str) else value
            if type(comparable) is not type(supported) or comparable != supported:
                raise ValueError(f"quantization_config has {key} = {value!r}; {AWQ_METHOD} supports {supported!r} only")
        group_size = _first(config, "group_size", "q_group_size")
        if type(group_size) is not int or not (group_size == -1 or (group_size > 0 and group_size % 8 == 0)):
            raise ValueError(
                f"quantization_config has group_size = {group_size!r}; {AWQ_METHOD} supports multiples of 8, and -1"
            )
        skipped = _first(config, "modules_to_not_convert", default=None) or []
        if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
            raise ValueError(f"quantization_config has modules_to_not_convert = {skipped!r}, expected a list of names")
        return cls(group_size, skipped)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take an AWQ checkpoint over, but only from a user who named us: vLLM asks this for every quantized model."""
        is_awq = str(hf_quant_cfg.get("quant_method", "")).lower() == "awq"
        return AWQ_METHOD if is_awq and user_quant == AWQ_METHOD else None

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

    def linear_method(self, prefix: str) -> LinearMethodBase:
        """How a linear layer that the checkpoint holds quantized is loaded and computed."""
        from .awq_linear import KernelgraftAWQLinearMethod

        return KernelgraftAWQLinearMethod(self.group_size, prefix)

    def experts_method(self, layer: torch.nn.Module, prefix: str) -> FusedMoEMethodBase:
        """How experts that the checkpoint holds quantized are loaded and computed.

        Raises:
            NotImplementedError: they are not run here; the message says why, and what runs them.
        """
        from kernelgraft_core.quant.formats.autoawq import Gemm

        from .experts import KernelgraftExpertsMethod

        try:
            return KernelgraftExpertsMethod(layer, Gemm(4, self.group_size), k_first=True, prefix=prefix)
        except NotImplementedError as error:
            raise NotImplementedError(f"{error}; serve with --quantization awq") from None


def _first(config: Mapping[str, Any], *keys: str, default: Any = _MISSING) -> Any:
    for key in keys:
        if key in config:
            return config[key]
    if default is _MISSING:
        raise ValueError(f"quantization_config has no {' or '.join(keys)}: it holds {sorted(config)}")
    return default
