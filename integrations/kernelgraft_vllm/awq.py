"""AutoAWQ checkpoints inside vLLM: the quantization config that a user selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import AWQ_METHOD
from .packed_config import PackedConfig, skipped_modules

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase

_MISSING = object()


class KernelgraftAWQConfig(PackedConfig):
    """An AutoAWQ checkpoint in GEMM layout: 4 bits, asymmetric, one scale and zero point per group and column.

    Args:
        group_size: weights along K that share a scale, a multiple of 8, or -1 for one group per column.
        modules_to_not_convert: names of layers that the checkpoint keeps in floating point, or parts of their paths.
    """

    def __init__(self, group_size: int, modules_to_not_convert: Sequence[str] = ()) -> None:
        super().__init__(modules_to_not_convert)
        self.group_size = group_size

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(group_size={self.group_size}, modules_to_not_convert={self.modules_to_not_convert})"
        )

    def get_name(self) -> str:
        return AWQ_METHOD

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
        return cls(group_size, skipped_modules(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take an AWQ checkpoint over, but only from a user who named us: vLLM asks this for every quantized model."""
        is_awq = str(hf_quant_cfg.get("quant_method", "")).lower() == "awq"
        return AWQ_METHOD if is_awq and user_quant == AWQ_METHOD else None

    def linear_method(self, prefix: str) -> LinearMethodBase:
        from .awq_linear import KernelgraftAWQLinearMethod

        return KernelgraftAWQLinearMethod(self.group_size, prefix)

    def experts_method(self, layer: torch.nn.Module, prefix: str) -> FusedMoEMethodBase:
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
