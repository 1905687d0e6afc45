"""Writing a quantized model: which layout its layers take, and the files around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernelgraft_core.quant.formats.autoawq import pack_gemm
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.w4a16.weight import W4A16Weight
from kernelgraft_core.quant.weights import QuantizedWeight

from .checkpoint import RECORD
from .shards import INDEX, PendingTensor, ShardReader, write_shards

if TYPE_CHECKING:
    from .quantize import SourceModel
    from .streaming import StreamedModel

FORMAT_VERSION = 1  # of our own layout


@dataclass(frozen=True)
class Output:
    """A layout that a quantized model can be written in.

    Attributes:
        name: as ``--format`` takes it.
        write: the tensors of one layer by the last part of their names.
        config: ``quantization_config`` of ``config.json``, from the scheme and the modules that are not quantized.
        holds: why a scheme cannot be written, None when it can.
    """

    name: str
    write: Callable[[QuantizedWeight, Scheme], dict[str, Tensor]]
    config: Callable[[Scheme, list[str]], dict[str, Any]]
    holds: Callable[[Scheme], str | None]


def _write_awq(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    assert isinstance(weight, W4A16Weight)
    return dict(zip(("qweight", "qzeros", "scales"), pack_gemm(weight), strict=True))


def _awq_config(scheme: Scheme, unquantized: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": unquantized or None,
    }


def _write_own(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    names = ["qweight", "scales"] if isinstance(weight, W4A16Weight) else ["qweight", "qhigh", "scales"]
    if not scheme.symmetric:
        names.append("zeros")
    return {name: getattr(weight, name).contiguous() for name in names}


def _own_config(scheme: Scheme, unquantized: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "kernelgraft_awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "modules_to_not_convert": unquantized or None,
        "format_version": FORMAT_VERSION,
    }


FORMATS = {
    output.name: output
    for output in (
        Output(
            "awq",
            _write_awq,
            _awq_config,
            lambda s: None if s.bits == 4 else f"AutoAWQ's GEMM layout has no {s.bits} bits",
        ),
        Output("kernelgraft", _write_own, _own_config, lambda s: None),
    )
}
"""By name. Other projects' layouts are one ``kernelgraft convert`` away."""


def choose_format(name: str | None, scheme: Scheme) -> Output:
    """The layout of that name; without one AutoAWQ's, which most programs load, or our own where it cannot hold it.

    Raises:
        ValueError: there is no such layout, or it cannot hold the scheme.
    """
    if name is None:
        return next(output for output in FORMATS.values() if output.holds(scheme) is None)
    if name not in FORMATS:
        raise ValueError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    if reason := FORMATS[name].holds(scheme):
        raise ValueError(f"format {name!r} does not fit: {reason}")
    return FORMATS[name]


def write_checkpoint(
    directory: Path,
    model: StreamedModel,
    blocks: Sequence[Path],
    source: SourceModel,
    scheme: Scheme,
    output: Output,
    unquantized: list[str],
    record: Mapping[str, Any],
) -> None:
    """Fill a directory: safetensors, config, whatever else lies beside the source, and the record.

    Args:
        blocks: a file for each block, with everything that the checkpoint holds of it.
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
    for key in ("torch_dtype", "dtype"):
        raw.pop(key, None)
    raw["dtype"] = str(source.dtype).removeprefix("torch.")
    raw["quantization_config"] = output.config(scheme, unquantized)
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    _copy_companions(source.directory, directory)
    (directory / RECORD).write_text(json.dumps(record, indent=2))


def _copied(reader: ShardReader, name: str, dtype: torch.dtype | None) -> PendingTensor:
    kind, shape = reader.describe(name)
    cast = dtype if dtype is not None and kind.is_floating_point else kind
    return PendingTensor(torch.Size(shape).numel() * cast.itemsize, lambda: reader.tensor(name).to(cast))


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, processor, generation settings: every small file that is neither weights nor ours."""
    for file in sorted(source.iterdir()):
        known = file.name in ("config.json", INDEX, RECORD) or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and not known:
            shutil.copyfile(file, target / file.name)
