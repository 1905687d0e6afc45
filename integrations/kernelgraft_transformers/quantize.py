"""From a model directory or name to a quantized checkpoint."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft_core import __version__
from kernelgraft_core.quant.architectures import find_architecture, linear_layer
from kernelgraft_core.quant.awq import AwqConfig, BlockResult, quantize_awq
from kernelgraft_core.quant.w4a16.weight import W4A16Weight
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .checkpoint import check_replaceable, load_model, replaced_directory, write_awq
from .texts import Calibration, encode

AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize; ``rtn`` is plain rounding, to compare with."""

    name: str
    scale_points: int
    clip_steps: int


RECIPES = {"awq": Recipe("awq", AwqConfig.scale_points, AwqConfig.clip_steps), "rtn": Recipe("rtn", 0, 0)}


@dataclass(frozen=True)
class SourceModel:
    """A model to quantize: float32 in memory, ``dtype`` as it was stored."""

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype


def load_source(name: str) -> SourceModel:
    """Load a directory or a hub name.

    Raises:
        UnsupportedModelError: it is quantized already, or no adapter knows it; CheckpointError: a file is truncated;
        OSError: it cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        raise UnsupportedModelError(f"{name} is quantized already ({method}); quantize the original model")
    stored = config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.float16
    model = load_model(name, torch.float32)
    find_architecture(model)
    return SourceModel(name, model, AutoTokenizer.from_pretrained(name), stored)


def choose_group_size(model: nn.Module) -> int:
    """The largest of 128, 64 and 32 that divides K of every layer to be quantized.

    Raises:
        ValueError: none does.
    """
    architecture = find_architecture(model)
    widths = {
        linear_layer(block, name).in_features
        for block in architecture.block_list(model)
        for group in architecture.scale_groups(block)
        for name in group.targets
    }
    for size in AUTO_GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise ValueError(f"no group size of {AUTO_GROUP_SIZES} divides every K of the model: {sorted(widths)}")


def quantize_checkpoint(
    source: SourceModel,
    out: Path,
    text: str,
    *,
    text_name: str = "the calibration text",
    recipe: str = "awq",
    group_size: int | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    on_block: Callable[[BlockResult], None] | None = None,
) -> dict[str, Any]:
    """Quantize a model (in place) and write an AutoAWQ GEMM checkpoint to ``out``, whole or not at all.

    Args:
        text: calibration text; ``text_name`` names it in messages.
        recipe: a key of :data:`RECIPES`.
        group_size: -1, or a divisor of every K; None chooses (:func:`choose_group_size`).
        on_block: called with each quantized block.

    Returns:
        The record that is stored beside the model and that ``kernelgraft inspect`` shows.

    Raises:
        ValueError: recipe, group size or text do not fit; FileExistsError: ``out`` is in the way; NonFiniteError: a
            layer holds NaN. Nothing at ``out`` changes then.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(sorted(RECIPES))}")
    if out.exists() and Path(source.name).exists() and out.samefile(source.name):
        raise ValueError(f"{out} is the model to be quantized; write to another directory")
    check_replaceable(out, overwrite=overwrite)
    model, calibration = source.model, calibration or Calibration()
    size = choose_group_size(model) if group_size is None else group_size
    tokens = encode(source.tokenizer, text)
    batches = [batch.to(model.device) for batch in calibration.draw(tokens, text_name)]
    chosen = RECIPES[recipe]
    config = AwqConfig(group_size=size, scale_points=chosen.scale_points, clip_steps=chosen.clip_steps)
    started = time.perf_counter()
    weights: dict[str, W4A16Weight] = {}
    layers: list[dict[str, Any]] = []
    for block in quantize_awq(model, batches, config):
        weights |= block.weights
        layers += [asdict(report) for report in block.reports]
        if on_block is not None:
            on_block(block)
    record = {
        "format": 1,
        "recipe": recipe,
        "kernelgraft": __version__,
        "source": source.name,
        "bits": 4,
        "group_size": size,
        "settings": asdict(config),
        "calibration": asdict(calibration)
        | {"text": text_name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text_tokens": len(tokens)},
        "seconds": round(time.perf_counter() - started, 1),
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        "layers": layers,
    }
    with replaced_directory(out, overwrite=overwrite) as directory:
        write_awq(directory, model, source.tokenizer, weights, record, source.dtype)
    return record
