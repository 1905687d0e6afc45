"""Quantized checkpoints as the float weights that they stand for: what a backend is to be held against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.packed.reference import dequantize
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.quant.weights import QuantizedWeight


def float_model(checkpoint: Path) -> Any:
    """A float32 model of Transformers with the weights of a checkpoint, quantized or not.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model, or holds one that the model does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    if not hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dict(_float_weights(checkpoint)), strict=False)
    model.tie_weights()
    if unexpected or any("lm_head" not in name for name in missing):
        raise ValueError(f"{checkpoint} is no such model for Transformers: {missing} missing, {unexpected} unknown")
    return model.eval()


def _float_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    layout = find_layout(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    parts: dict[str, dict[str, Tensor]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            layer, _, part = name.rpartition(".")
            parts.setdefault(layer, {})[part] = tensor
    for layer, tensors in parts.items():
        plain = {part: tensors.pop(part) for part in ("weight", "bias") if part in tensors}
        yield from ((f"{layer}.{part}", tensor.float()) for part, tensor in plain.items())
        if tensors:
            yield f"{layer}.weight", _values(layout.read(tensors))


def _values(weight: QuantizedWeight) -> Tensor:
    if isinstance(weight, W4A8Weight):
        return weight.values(torch.float32)
    return dequantize(weight.integers(), weight.scales, weight.zeros, torch.float32)
