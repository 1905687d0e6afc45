"""Writing a quantized model: which layout its layers take, and the files around them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.formats.registry import TARGETS
from kernelgraft_core.quant.rounding import Scheme

from .checkpoint import RECORD, copy_companions
from .shards import PendingTensor, ShardReader, write_shards

if TYPE_CHECKING:
    from .quantize import SourceModel
    from .streaming import StreamedModel


def choose_layout(name: str | None, scheme: Scheme) -> tuple[str, Layout]:
    """The layout of that name; without one AutoAWQ's, which most programs load, or our own where it cannot hold it.

    Args:
        name: a key of :data:`~kernelgraft_core.quant.formats.registry.TARGETS`.

    Raises:
        ValueError: there is no such layout, or it cannot hold the scheme.
    """
    if name is None:
        name = "awq" if scheme.bits == 4 else "kernelgraft"
    if name not in TARGETS:
        raise ValueError(f"no format {name!r}; there are {', '.join(TARGETS)}")
    kind = TARGETS[name]
    try:
        # A layout that always stores zero points stores the middle for a symmetric scheme.
        return name, kind(scheme.bits, scheme.group_size, scheme.symmetric and kind.may_be_symmetric)
    except ValueError as error:
        raise ValueError(f"format {name!r} does not fit: {error}") from None


def write_checkpoint(
    directory: Path,
    model: StreamedModel,
    blocks: Sequence[Path],
    source: SourceModel,
    layout: Layout,
    unquantized: list[str],
    record: Mapping[str, Any],
) -> None:
    """Fill a directory: safetensors, config, whatever else lies beside the source, and the record.

    Args:
        blocks: a file for each block, with everything that the checkpoint holds of it.
        unquantized: modules in which linear layers are that stay as they are, the output head apart.
        record: what ``kernelgraft inspect`` shows.
    """
    raw = json.loads((source.directory / "config.json").read_text())
    quantized = ShardReader(blocks)
    tensors: dict[str, PendingTensor] = {}
    for name in model.names_outside_blocks():
        if not (name == "lm_head.weight" and raw.get("tie_word_embeddings")):
            tensors[name] = _copied(model.reader, name, source.dtype)
    for name in quantized.names():
        tensors[name] = _copied(quantized, name, None)
    write_shards(directory, dict(sorted(tensors.items())))
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(source.dtype).removeprefix("torch.")
    raw["quantization_config"] = layout.config(unquantized or None)
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    copy_companions(source.directory, directory)
    (directory / RECORD).write_text(json.dumps(record, indent=2))


def _copied(reader: ShardReader, name: str, dtype: torch.dtype | None) -> PendingTensor:
    kind, shape = reader.describe(name)
    cast = dtype if dtype is not None and kind.is_floating_point else kind
    return PendingTensor(torch.Size(shape).numel() * cast.itemsize, lambda: reader.tensor(name).to(cast))
