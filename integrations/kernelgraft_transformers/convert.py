"""From one checkpoint format to another, layer by layer: the integers stay as they are, only their places change."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.quant.formats.autoawq import AwqLayout
from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.formats.layout import Layout, StoredTensor
from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.formats.qserve import QServe
from kernelgraft_core.quant.formats.registry import TARGETS, find_layout
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.runtime.errors import CheckpointError

from .checkpoint import (
    RECORD,
    activation_scales,
    check_index,
    check_layers,
    check_replaceable,
    copy_companions,
    open_files,
    read_json,
    read_quantization_config,
    replaced_directory,
)
from .shards import INDEX, SAFETENSORS, PendingTensor, ShardReader, list_shards, write_shards
from .torch_files import TORCH_FILES, TORCH_INDEX, TorchReader

SOURCES = ("llm-awq", "qserve")
"""Formats whose files do not say what they are. Those of QServe are known by the names of their tensors, too."""

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Origin:
    """A checkpoint to convert.

    Attributes:
        directory: of ``config.json`` and the tokenizer.
        files: the weights, all safetensors or none.
        quantization: the ``quantization_config``, its own or the one that the caller gives; empty where there is none.
    """

    directory: Path
    files: list[Path]
    config: dict[str, Any]
    quantization: dict[str, Any]


@dataclass
class Conversion:
    """What was done.

    Attributes:
        source, target: the formats, in words.
        layers: how many quantized ones there are.
        bytes: of all tensors written.
        rounded: layers whose scales were not float16, and lost bits when they became so.
    """

    source: str
    target: str
    layers: int
    bytes: int
    rounded: list[str] = field(default_factory=list)


def find_origin(
    source: Path,
    *,
    source_format: str | None = None,
    config: Path | None = None,
    group_size: int | None = None,
    s2_order: str | None = None,
) -> Origin:
    """Look at a checkpoint before it is opened; arguments as for :func:`convert_checkpoint`.

    Raises:
        CheckpointError: something is missing; ValueError: the arguments do not go together.
    """
    if source_format is not None and source_format not in SOURCES:
        raise ValueError(f"no source format {source_format!r}; there are {', '.join(SOURCES)}")
    if source_format != "qserve" and (source_format is None) != (group_size is None):
        raise ValueError("the group size and the source format 'llm-awq' are given together or not at all")
    if s2_order is not None and source_format != "qserve":
        raise ValueError(f"s2_order = {s2_order!r} is one of source format 'qserve', which is not given")
    if not source.exists():
        raise CheckpointError(f"{source} is neither a model directory nor a file")
    directory = config or (source if source.is_dir() else source.parent)
    settings = read_json(directory / "config.json")
    quantization = read_quantization_config(directory, settings)
    if source_format == "llm-awq":
        quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "backend": source_format}
    elif source_format == "qserve":
        quantization = {"quant_method": "qserve", "group_size": group_size, "s2_order": s2_order or "qserve"}
    return Origin(directory, _weight_files(source), settings, quantization or {})


def _layout_of(origin: Origin, stored: Mapping[str, StoredTensor]) -> Layout:
    quantization = origin.quantization
    if not quantization and any(name.endswith(f".{QServe.scale}") for name in stored):
        quantization = {"quant_method": "qserve"}
    if not quantization:
        raise CheckpointError(
            f"{origin.directory} has no quantization_config: nothing in it is quantized, unless it comes from llm-awq, "
            "which must be said together with its group size"
        )
    return find_layout(quantization, stored)


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if any(source.glob("*.safetensors")):
        return list_shards(source)
    found = sorted(source.glob("pytorch_model*.bin")) or sorted(source.glob("*.pt"))
    if not found:
        raise CheckpointError(f"{source} holds no .safetensors, pytorch_model*.bin or .pt file")
    if len(found) > 1 and found[0].suffix == ".pt":
        raise CheckpointError(f"{source} holds {len(found)} .pt files; name the one to convert")
    return found


def convert_checkpoint(
    source: Path,
    out: Path,
    target: str,
    *,
    source_format: str | None = None,
    config: Path | None = None,
    group_size: int | None = None,
    s2_order: str | None = None,
    overwrite: bool = False,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Write a quantized checkpoint to ``out`` in another format, whole or not at all.

    Integers, zero points and whatever is not quantized stay the same; scales become float16. One shard is in memory at
    a time. Tensors and files that belong to no quantized layer are copied under the names they have.

    Args:
        source: a model directory, or a ``.pt`` file of llm-awq.
        target: a key of :data:`~kernelgraft_core.quant.formats.registry.TARGETS`.
        source_format: ``"llm-awq"`` or ``"qserve"`` for files without a ``quantization_config``.
        config: directory of ``config.json`` and the tokenizer, by default the one that ``source`` is or lies in.
        group_size: with ``source_format``, what it was quantized with; QServe's files tell.
        s2_order: with ``source_format`` ``"qserve"``, a key of
            :data:`~kernelgraft_core.quant.formats.qserve.S2_ORDERS`.
        on_tensor: called after each tensor with its name, the bytes written so far and those to write.

    Raises:
        CheckpointError: a file is truncated, tensors are missing or contradict the config, or the target cannot hold
            them; the message names the file and the layer. ValueError: an argument is wrong. FileExistsError: ``out``
            is in the way. OSError: there is no space. Nothing at ``out`` changes then.
    """
    if target not in TARGETS:
        raise ValueError(f"no target format {target!r}; there are {', '.join(TARGETS)}")
    origin = find_origin(source, source_format=source_format, config=config, group_size=group_size, s2_order=s2_order)
    if any(out.resolve() in (used, *used.parents) for used in (source.resolve(), origin.directory.resolve())):
        raise ValueError(f"{out} holds what is to be converted; write to another directory")
    check_replaceable(out, overwrite=overwrite)
    with open_files(origin.files) as reader:
        stored = {name: StoredTensor(*reader.describe(name)) for name in reader.names()}
        if source.is_dir():
            check_index(source / (INDEX if isinstance(reader, ShardReader) else TORCH_INDEX), stored)
        layout = _layout_of(origin, stored)
        layers = check_layers(stored, layout, source)
        written = _target_layout(layout, target, stored, layers, source)
        if isinstance(written, QServe):
            _check_norms(reader, stored, source)
        result = Conversion(layout.label, written.label, len(layers), 0)
        plan = _plan(reader, stored, layout, written, layers, result)
        settings = _settings(origin, stored, layers, written)
        _settle_head(plan, settings, reader, written)
        result.bytes = sum(pending.size for pending in plan.values())
        _check_space(out, result.bytes)
        with replaced_directory(out, overwrite=overwrite) as directory:
            kind = TORCH_FILES if isinstance(written, QServe) else SAFETENSORS
            write_shards(directory, _watched(plan, result.bytes, on_tensor), kind)
            (directory / "config.json").write_text(json.dumps(settings, indent=2))
            copy_companions(origin.directory, directory)
            if (origin.directory / RECORD).is_file():
                shutil.copyfile(origin.directory / RECORD, directory / RECORD)
    return result


def _target_layout(
    layout: Layout,
    target: str,
    stored: Mapping[str, StoredTensor],
    layers: Mapping[str, tuple[int, int]],
    source: Path,
) -> Layout:
    """The layout to write, after a check that it holds every layer."""
    kind = TARGETS[target]
    if layout.activation_bits != kind.activation_bits:
        raise CheckpointError(
            f"{source} holds weights for activations of {layout.activation_bits} bits, {kind.label} for those of "
            f"{kind.activation_bits}"
        )
    if layout.bits not in kind.widths:
        raise CheckpointError(f"{source} has {layout.bits} bits, which {kind.label} cannot hold")
    try:
        written = _same_settings(layout, kind)
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be written as {kind.label}: {error}") from None
    for name, (n, k) in layers.items():
        try:
            written.parts(n, k)
        except ValueError as error:
            raise CheckpointError(f"{source}: {name} cannot be written: {error}") from None
    if not issubclass(kind, AwqLayout) and (scales := activation_scales(stored)):
        raise CheckpointError(
            f"{source}: {scales[0]} scales the output of an activation function, which {kind.label} cannot hold"
        )
    return written


def _same_settings(layout: Layout, kind: type[Layout]) -> Layout:
    """A layout of that kind for the weights that ``layout`` holds."""
    if issubclass(kind, Qoq):
        # The latter holds every zero point.
        return layout if isinstance(layout, Qoq) else kind(layout.bits, layout.group_size, zero_form="post")
    return kind(layout.bits, layout.group_size, layout.symmetric and kind.may_be_symmetric)


def _check_norms(reader: ShardReader | TorchReader, stored: Mapping[str, StoredTensor], source: Path) -> None:
    """Refuse norms with weights: QServe reads none, since rotation moves them into the layers behind."""
    for name in stored:
        if "norm" in name and not (name.endswith(".weight") and bool((reader.tensor(name) == 1).all())):
            raise CheckpointError(
                f"{source}: {name} is not 1 everywhere, and QServe reads no norms; quantize with rotate=true"
            )


def _settings(
    origin: Origin, stored: Mapping[str, StoredTensor], layers: Mapping[str, tuple[int, int]], written: Layout
) -> dict[str, Any]:
    """The ``config.json`` to write."""
    settings = dict(origin.config)
    settings.pop("quantization_config", None)
    if quantization := written.config(_skipped(origin, stored, layers, written)):
        settings["quantization_config"] = quantization
    return settings


def _settle_head(
    plan: dict[str, PendingTensor], settings: dict[str, Any], reader: ShardReader | TorchReader, written: Layout
) -> None:
    """Take an output head that is the embeddings out of ``plan``, or put it in, as the files to be written want it.

    State dicts hold it, safetensors do not. One in a state dict that differs from the embeddings was untied without a
    word, as QServe's models are, which keep the config of the model that was rotated: ``settings`` are put right.
    """
    if not settings.get("tie_word_embeddings"):
        return
    if isinstance(written, QServe):
        if HEAD not in plan and EMBEDDINGS in plan:
            plan[HEAD] = plan[EMBEDDINGS]
    elif isinstance(reader, TorchReader) and HEAD in plan:
        head, shape = reader.tensor(HEAD), reader.describe(HEAD)[1]
        alike = [name for name in reader.names() if name != HEAD and reader.describe(name)[1] == shape]
        if any(torch.equal(reader.tensor(name), head) for name in alike):
            del plan[HEAD]
        else:
            settings["tie_word_embeddings"] = False


def _plan(
    reader: ShardReader | TorchReader,
    stored: Mapping[str, StoredTensor],
    layout: Layout,
    written: Layout,
    layers: Mapping[str, tuple[int, int]],
    result: Conversion,
) -> dict[str, PendingTensor]:
    """Every tensor to write, each layer's together, in the order of the source."""
    plan: dict[str, PendingTensor] = {}
    repacker = _Repacker(reader, layout, written, layers, result)
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers or part == "bias":
            plan[name] = PendingTensor(tensor.bytes, partial(reader.tensor, name))
        elif part == layout.packed:
            for new, wanted in written.parts(*layers[layer]).items():
                plan[f"{layer}.{new}"] = PendingTensor(wanted.written.bytes, partial(repacker.tensor, layer, new))
    return plan


class _Repacker:
    """Repacks one layer at a time, and holds it while its tensors are asked for."""

    def __init__(
        self,
        reader: ShardReader | TorchReader,
        layout: Layout,
        written: Layout,
        layers: Mapping[str, tuple[int, int]],
        result: Conversion,
    ) -> None:
        self._reader, self._layout, self._written, self._layers = reader, layout, written, layers
        self._result = result
        self._layer: str | None = None
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, layer: str, part: str) -> Tensor:
        if layer != self._layer:
            self._tensors, self._layer = self._repack(layer), layer
        return self._tensors[part]

    def _repack(self, layer: str) -> dict[str, Tensor]:
        parts = self._layout.parts(*self._layers[layer])
        tensors = {part: self._reader.tensor(f"{layer}.{part}") for part in parts}
        scales = tensors[self._layout.scale]
        try:
            weight = self._layout.read(tensors)
            if isinstance(weight, W4A8Weight):
                return self._written.write(weight)
            if not weight.scales.isfinite().all():
                raise ValueError(f"{self._layout.scale} is not finite everywhere in float16")
            if scales.dtype != torch.float16 and (scales.to(torch.float16).to(scales.dtype) != scales).any():
                self._result.rounded.append(layer)
            return self._written.write(weight)
        except ValueError as error:
            raise CheckpointError(f"{layer}: {error}") from None


def _watched(
    plan: Mapping[str, PendingTensor], total: int, on_tensor: Callable[[str, int, int], None] | None
) -> dict[str, PendingTensor]:
    """The plan, telling ``on_tensor`` how far it is."""
    if on_tensor is None:
        return dict(plan)
    done = 0

    def get(name: str, pending: PendingTensor) -> Tensor:
        nonlocal done
        tensor = pending.get()
        done += pending.size
        on_tensor(name, done, total)
        return tensor

    return {name: PendingTensor(pending.size, partial(get, name, pending)) for name, pending in plan.items()}


def _check_space(out: Path, needed: int) -> None:
    """Refuse before the first byte what cannot fit."""
    place = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{out} needs {needed:,} bytes, but {place} has {free:,} free")


def _skipped(
    origin: Origin, stored: Mapping[str, StoredTensor], layers: Mapping[str, Any], written: Layout
) -> list[str] | None:
    """The modules that are not quantized, as the target's config names them."""
    by_name = isinstance(written, PackQuantized)
    key = "ignore" if by_name else "modules_to_not_convert"
    if key in origin.quantization:
        own: list[str] | None = origin.quantization[key]
        return own
    plain = [
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    ]
    if not by_name:
        return list(dict.fromkeys(_shortest_prefix(name, layers) for name in plain)) or None
    if origin.config.get("tie_word_embeddings"):
        plain.append("lm_head")
    return sorted(set(plain))


def _shortest_prefix(name: str, layers: Mapping[str, Any]) -> str:
    """A module that holds ``name`` and no quantized layer. Hosts match substrings: ``layers.1`` is in ``layers.10``."""
    steps = name.split(".")
    prefixes = (".".join(steps[:count]) for count in range(1, len(steps)))
    return next((prefix for prefix in prefixes if not any(prefix in layer for layer in layers)), name)
