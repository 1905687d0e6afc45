"""Loading packed checkpoints in ``from_pretrained``: what the formats have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kernelgraft_core.quant.experts import find_fused_experts, unfuse_experts
from kernelgraft_core.quant.formats.layout import Layout, StoredTensor
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.runtime.errors import CheckpointError, UnsupportedModelError

from .checkpoint import activation_scales, check_layers, read_headers


class PackedConfig(QuantizationConfigMixin):
    """What the ``quantization_config`` of our own formats have in common. Subclasses set their settings first.

    Args:
        method: the format's ``quant_method``.
        modules_to_not_convert: names, or parts of paths, of what is stored unquantized; the output head is anyway.
        format_version: of the format.
        unknown: settings that the format does not have.

    Raises:
        CheckpointError: there are any, or a value is not one of the format; the message names it.
    """

    def __init__(
        self,
        method: str,
        modules_to_not_convert: list[str] | None,
        format_version: int | None,
        unknown: Mapping[str, Any],
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config has {', '.join(sorted(unknown))}, unknown to {method}")
        listed = modules_to_not_convert
        if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
            raise CheckpointError(
                f"quantization_config has modules_to_not_convert = {listed!r}, expected a list of names"
            )
        self.quant_method = method
        self.modules_to_not_convert, self.format_version = listed, format_version
        self.layout()

    def layout(self) -> Layout:
        """How the layers are stored."""
        return find_layout(self.to_dict())


class PackedQuantizer(HfQuantizer):
    """Replaces the linear layers of a model under construction by :class:`PackedLinear`, those of experts included.

    Attributes:
        layer_type: of the new layers.
        layout: how the checkpoint stores its layers, known once its files are.

    Raises:
        CheckpointError: the checkpoint's ``quantization_config`` is one that the kernels do not run, or its tensors are
            missing, truncated, not finite or not what that config says; the message gives the value or the layer.
    """

    requires_calibration = True
    layer_type: ClassVar[type[PackedLinear]] = PackedLinear

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.layout: Layout
        self._dtype: torch.dtype | None = None
        self._unfused = False

    def find_layout(self, stored: Mapping[str, StoredTensor]) -> Layout:
        """The layout that the ``quantization_config`` says, and ``stored`` where it leaves something open.

        Args:
            stored: the checkpoint's tensors by name; none while they are not known.

        Raises:
            CheckpointError: there is no such layout.
        """
        found: Layout = self.quantization_config.layout()
        return found

    def new_layer(self, linear: nn.Linear) -> PackedLinear:
        """An empty layer in place of ``linear``.

        Raises:
            ValueError: the layout cannot hold it.
        """
        return self.layer_type(
            linear.in_features,
            linear.out_features,
            self.layout,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        # Transformers itself fills what is missing with noise, casts what has another dtype, and warns at most.
        files = [Path(file) for file in checkpoint_files or ()]
        stored = read_headers(files)
        self.layout = self.find_layout(stored)
        skipped = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        if stored:
            _check_excluded(check_layers(stored, self.layout, files[0].parent), skipped)
            _check_activations(stored, model)
        try:
            self._unfused = any(not _is_skipped(name, skipped) for name, _ in find_fused_experts(model))
        except UnsupportedModelError as error:
            raise CheckpointError(f"experts of {type(model).__name__} cannot be loaded quantized: {error}") from None
        if self._unfused:
            unfuse_experts(model)
        replaced = 0
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear) or _is_skipped(name, skipped):
                continue
            try:
                layer = self.new_layer(module)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}; list it in modules_to_not_convert") from None
            _take_dtypes(layer, {part: stored.get(f"{name}.{part}") for part in layer.stored})
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.requires_grad_(False))
            replaced += 1
        if not replaced:
            raise CheckpointError(
                f"no linear layer of {type(model).__name__} is left to load as {self.layout.label}; skipped: {skipped}"
            )

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """The same without the fusing of experts, when they are loaded one by one.

        Transformers passes the model too since 5.23.
        """
        return _without_fusing(weight_conversions) if self._unfused else weight_conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in model.named_modules():
            if not isinstance(module, PackedLinear) or module.prepared:
                continue
            if any(buffer.device.type == "meta" for buffer in module.buffers()):
                module.keeps_layout = True  # offloaded: the tensors come for the forward pass, by the names of now
                continue
            _check_loaded(name, module)
            try:
                module.prepare()
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
        self._cast_renamed(model)
        return model

    def _cast_renamed(self, model: Any) -> None:
        # Transformers leaves the tensors that it renames in the dtype of the file when a model is quantized.
        kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, parameter in model.named_parameters():
            floating = parameter.is_floating_point() and parameter.device.type != "meta"
            if floating and self._dtype and parameter.dtype != self._dtype and not _is_skipped(name, kept):
                parameter.data = parameter.data.to(self._dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: the input's gradient is there, the weight's is not

    @property
    def is_compileable(self) -> bool:
        return not self._unfused  # which experts run depends on the values


def _without_fusing(conversions: list[Any]) -> list[Any]:
    """The conversions of a checkpoint whose experts stay apart: those that would stack them become new names."""
    kept = []
    for conversion in conversions:
        target = conversion.target_patterns[0]
        if not isinstance(conversion, WeightConverter) or not target.endswith(("gate_up_proj", "down_proj")):
            kept.append(conversion)
            continue
        names = ("gate_proj", "up_proj") if target.endswith("gate_up_proj") else ("down_proj",)
        for source, name in zip(conversion.source_patterns, names, strict=True):
            stored = source.removesuffix(".weight").rpartition(".")[2]
            if stored != name:
                kept.append(WeightRenaming(rf"\.experts\.(\d+)\.{stored}\.", rf".experts.\1.{name}."))
    return kept


def _check_excluded(layers: Iterable[str], skipped: Sequence[str]) -> None:
    """Transformers would fill the layer with noise, and warn at most."""
    if both := [name for name in layers if _is_skipped(name, skipped)]:
        raise CheckpointError(
            f"{both[0]} is stored quantized, but modules_to_not_convert, or the model's class for an output head, says "
            "that it is not"
        )


def _check_activations(stored: Mapping[str, StoredTensor], model: nn.Module) -> None:
    """Transformers would only warn of a divisor that no module takes, and compute without it."""
    if unused := sorted(set(activation_scales(stored)) - model.state_dict().keys()):
        raise CheckpointError(
            f"{unused[0]} scales the output of an activation function, which is not done here; with the plugin "
            "unloaded, Transformers loads the checkpoint through gptqmodel"
        )


def _take_dtypes(layer: PackedLinear, stored: Mapping[str, StoredTensor | None]) -> None:
    """Buffers of the dtypes in the files: cast to another, scaled zero points are no multiples of their scales."""
    for part, found in stored.items():
        if found is not None:
            layer.register_buffer(part, layer.get_buffer(part).to(found.dtype))


def _check_loaded(name: str, layer: PackedLinear) -> None:
    # The flag is how Transformers itself tells what it has read from what it has made up.
    if absent := [part for part, buffer in layer.named_buffers() if not getattr(buffer, "_is_hf_initialized", False)]:
        raise CheckpointError(
            f"{name}: the checkpoint has no {', '.join(absent)}; a layer that is stored unquantized must be listed in "
            "modules_to_not_convert"
        )
    if not layer.get_buffer(layer.layout.scale).to(torch.float16).isfinite().all():
        raise CheckpointError(f"{name}: scales in the checkpoint are not all finite in float16")


def _is_skipped(name: str, skipped: Sequence[str]) -> bool:
    """Whether a layer is excluded: by its name, a module that holds it, or any whole part of its path."""
    parts = f".{name}."
    return any(f".{pattern}." in parts for pattern in skipped)
