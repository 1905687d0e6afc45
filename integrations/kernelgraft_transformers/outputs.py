"""Writing a quantized model: which layout its layers take, and the files around them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.formats.registry import TARGETS
from kernelgraft_core.quant.outcome import TensorChange
from kernelgraft_core.quant.rounding import Scheme

from .checkpoint import RECORD, copy_companions
from .shards import PendingTensor, ShardReader, write_shards

PACKED = ("awq", "kernelgraft", "compressed-tensors")
"""Formats of weights for activations of 16 bits: AutoAWQ's, which most programs load, first."""

if TYPE_CHECKING:
    from .quantize import SourceModel
    from .streaming import StreamedModel


def choose_layout(name: str | None, scheme: Scheme, among: Sequence[str] = PACKED) -> tuple[str, Layout]:
    """The layout of that name; without one the first of those possible that holds the scheme.

    Args:
        name: a key of :data:`~kernelgraft_core.quant.formats.registry.TARGETS`.
        among: the names of the formats that hold what a recipe yields.

    Raises:
        ValueError: there is no such layout, it is not among those possible, or it cannot hold the scheme.
    """
    if name is not None and name not in TARGETS:
        raise ValueError(f"no format {name!r}; there are {', '.join(TARGETS)}")
    if name is not None and name not in among:
        raise ValueError(f"format {name!r} does not hold what this recipe yields; possible: {', '.join(among)}")
    problem = None
    for choice in among if name is None else (name,):
        kind = TARGETS[choice]
        try:
            # A layout that always stores zero points stores the middle for a symmetric scheme.
            return choice, kind(scheme.bits, scheme.group_size, scheme.symmetric and kind.may_be_symmetric)
        except ValueError as error:
            problem = f"format {choice!r} does not fit: {error}"
    raise ValueError(problem)


def write_checkpoint(
    directory: Path,
    model: StreamedModel,
    blocks: Sequence[Path],
    source: SourceModel,
    layout: Layout,
    unquantized: list[str],
    record: Mapping[str, Any],
    changes: Mapping[str, TensorChange],
) -> None:
    """Fill a directory: safetensors, config, whatever else lies beside the source, and the record.

    Args:
        blocks: a file for each block, with everything that the checkpoint holds of it.
        unquantized: modules in which linear layers are that stay as they are, the output head apart.
        record: what ``kernelgraft inspect`` shows.
        changes: what becomes of tensors outside the blocks, by the model's names; an output head among them that shared
            the embeddings' tensor is stored by itself.
    """
    raw = json.loads((source.directory / "config.json").read_text())
    quantized = ShardReader(blocks)
    tensors: dict[str, PendingTensor] = {}
    changed = {model.stored_parameter(name): change for name, change in changes.items()}
    for name in model.names_outside_blocks():
        if not (name == "lm_head.weight" and raw.get("tie_word_embeddings")):
            tensors[name] = _copied(model.reader, name, source.dtype, changed.get(name))
    if untied := changed.keys() - tensors.keys():
        # The head shared the embeddings' tensor, and is made from it.
        (name,) = untied
        tensors[name] = _copied(model.reader, model.stored_embeddings(), source.dtype, changed[name])
        for config in (raw, raw.get("text_config", {})):
            config["tie_word_embeddings"] = False
    for name in quantized.names():
        tensors[name] = _copied(quantized, name, None)
    write_shards(directory, dict(sorted(tensors.items())))
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(source.dtype).removeprefix("torch.")
    raw["quantization_config"] = layout.config(unquantized or None)
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    copy_companions(source.directory, directory)
    (directory / RECORD).write_text(json.dumps(record, indent=2))


def _copied(
    reader: ShardReader, name: str, dtype: torch.dtype | None, change: TensorChange | None = None
) -> PendingTensor:
    kind, shape = reader.describe(name)
    cast = dtype if dtype is not None and kind.is_floating_point else kind

    def make() -> torch.Tensor:
        tensor = reader.tensor(name)
        return (tensor if change is None else change(tensor.float())).to(cast)

    return PendingTensor(torch.Size(shape).numel() * cast.itemsize, make)
