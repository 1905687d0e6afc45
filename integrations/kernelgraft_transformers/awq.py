"""AWQ checkpoints in ``AutoModelForCausalLM.from_pretrained`` on kernelgraft's kernels, on CPU and GPU.

Transformers itself loads them through gptqmodel. Its ``register_quantizer`` refuses a name that it has, so the entry of
its table is replaced, and put back when the plugin is unloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from kernelgraft_core.quant.w4a16.linear import AwqLinear
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_core.runtime.patching import Patches

from .checkpoint import check_awq_tensors, read_headers


def graft(patches: Patches) -> None:
    """Make ``quant_method: "awq"`` load as :class:`AwqQuantizer`, recorded in ``patches``."""
    patches.item(auto.AUTO_QUANTIZER_MAPPING, "awq", AwqQuantizer)


class AwqQuantizer(HfQuantizer):
    """Replaces the linear layers of a model under construction by :class:`AwqLinear`.

    Raises:
        CheckpointError: the checkpoint's ``quantization_config`` is one that the kernels do not run, or its tensors are
            missing, truncated, not finite or not what that config says; the message gives the value or the layer.
    """

    requires_calibration = True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        config = self.quantization_config
        format_name = str(getattr(config.format, "value", config.format))
        for key, value, wanted in (
            ("bits", config.bits, 4),
            ("zero_point", config.zero_point, True),
            ("version", format_name, "gemm"),
        ):
            if value != wanted:
                raise CheckpointError(
                    f"quantization_config has {key} = {value!r}; kernelgraft's AWQ layers run {key} = {wanted!r}"
                )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        # Transformers itself fills what is missing with noise, casts what has another dtype, and warns at most.
        files = [Path(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if files:
            check_awq_tensors(read_headers(files), self.quantization_config.group_size, files[0].parent)
        skipped = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        replaced = 0
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear) or _is_skipped(name, skipped):
                continue
            try:
                layer = AwqLinear(
                    module.in_features,
                    module.out_features,
                    self.quantization_config.group_size,
                    bias=module.bias is not None,
                    dtype=module.weight.dtype,
                    device=module.weight.device,
                )
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}; list it in modules_to_not_convert") from None
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.requires_grad_(False))
            replaced += 1
        if not replaced:
            raise CheckpointError(
                f"no linear layer of {type(model).__name__} is left to load as AWQ; skipped: {skipped}"
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, AwqLinear) and not module.prepared and module.qweight.device.type != "meta":
                _check_loaded(name, module)
                try:
                    module.prepare()
                except ValueError as error:
                    raise CheckpointError(f"{name}: {error}") from None
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: the input's gradient is there, the weight's is not

    @property
    def is_compileable(self) -> bool:
        return True


def _check_loaded(name: str, layer: AwqLinear) -> None:
    # The flag is how Transformers itself tells what it has read from what it has made up.
    if absent := [part for part, buffer in layer.named_buffers() if not getattr(buffer, "_is_hf_initialized", False)]:
        raise CheckpointError(
            f"{name}: the checkpoint has no {', '.join(absent)}; a layer that is stored unquantized must be listed in "
            "modules_to_not_convert"
        )
    if not layer.scales.isfinite().all():
        raise CheckpointError(f"{name}: scales in the checkpoint are not all finite")


def _is_skipped(name: str, skipped: list[str]) -> bool:
    """Whether a layer is excluded: by its name, a module that holds it, or any whole part of its path."""
    parts = f".{name}."
    return any(f".{pattern}." in parts for pattern in skipped)
