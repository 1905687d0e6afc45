"""Model directories: written whole or not at all, and described."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kernelgraft_core.quant.formats.layout import Layout, StoredTensor
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.runtime.errors import CheckpointError

from .shards import DTYPES, INDEX, ShardReader, list_shards
from .torch_files import TorchReader

log = logging.getLogger("kernelgraft")

RECORD = "kernelgraft.json"
OLD_CONFIG = "quant_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@contextmanager
def replaced_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new directory to fill, which becomes ``path`` when the block ends well and vanishes when it does not.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is off, or it holds files that are no model.
    """
    check_replaceable(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        fresh.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            try:
                os.rename(path, old / "model")
                os.rename(fresh, path)
            except BaseException:  # Ctrl-C between the two included
                if (old / "model").exists() and not path.exists():
                    os.rename(old / "model", path)
                old.rmdir()
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, what :func:`replaced_directory` would refuse."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")
    if not (path / "config.json").is_file():
        raise FileExistsError(f"{path} is not a model directory (no config.json); it is not replaced")


def load_model(name: str, dtype: torch.dtype | str) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` for inference, from a directory or a hub name.

    Raises:
        CheckpointError: a file is truncated, or nothing that is loaded reads its quantization; OSError: the model
            cannot be read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantization_method(name)
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        # Transformers would fill the layers with noise, and warn.
        raise CheckpointError(
            f"{name} is quantized, quant_method {method!r}, which neither Transformers nor a loaded plugin reads"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except SafetensorError as error:
        raise CheckpointError(f"{name} holds a file that is not whole: {error}") from None


def quantization_method(name: str) -> str | None:
    """The ``quant_method`` of a model, of a directory or a hub name; None where it is not quantized.

    Raises:
        CheckpointError: ``name`` can only be a directory, and there is none; OSError: the config cannot be read.
    """
    from transformers import AutoConfig

    if (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1) and not Path(name).is_dir():
        raise CheckpointError(f"there is no model directory {name}")
    quantization = getattr(AutoConfig.from_pretrained(name), "quantization_config", None) or {}
    method: str | None = quantization.get("quant_method")
    return method


def describe(directory: Path) -> dict[str, Any]:
    """What a model directory holds, from its files alone: no tensor is read.

    Returns:
        ``quantization_config`` (as stored, or None), ``layout`` (how its layers are stored: format, bits, group size,
        symmetric or not; None when they are not quantized or in no layout of ours), ``quantized_layers``, ``record``
        (ours or None), ``tensors`` (count and elements by dtype) and ``bytes`` on disk.

    Raises:
        CheckpointError: no config, a truncated or missing safetensors file, or packed tensors that do not fit the
            quantization_config; the message names the file.
    """
    config = read_json(directory / "config.json")
    record = read_json(directory / RECORD) if (directory / RECORD).exists() else None
    files = list_shards(directory)
    stored = read_headers(files)
    check_index(directory / INDEX, stored)
    by_dtype: dict[str, dict[str, int]] = {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    for tensor in stored.values():
        row = by_dtype.setdefault(names[tensor.dtype], {"tensors": 0, "elements": 0})
        row["tensors"] += 1
        row["elements"] += torch.Size(tensor.shape).numel()
    quantization = read_quantization_config(directory, config)
    layout, layers = None, sum(name.endswith(".qweight") for name in stored)
    if quantization:
        try:
            layout = find_layout(quantization, stored)
        except CheckpointError as error:
            log.info("%s: its layers are not checked: %s", directory, error)
        else:
            layers = len(check_layers(stored, layout, directory))
    return {
        "path": str(directory),
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "quantization_config": quantization,
        "layout": layout
        and {
            "format": layout.label,
            "bits": layout.bits,
            "group_size": layout.group_size,
            "symmetric": layout.symmetric,
        },
        "tensors": by_dtype,
        "quantized_layers": layers,
        "bytes": sum(file.stat().st_size for file in files),
        "record": record,
    }


def read_quantization_config(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a ``config.json``, or the file that AutoAWQ wrote before there was one, or None."""
    quantization = config.get("quantization_config")
    if quantization is None and (directory / OLD_CONFIG).is_file():
        quantization = read_json(directory / OLD_CONFIG)
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{directory}: quantization_config is {quantization!r}, expected an object")
    return quantization


def open_files(files: Sequence[Path]) -> ShardReader | TorchReader:
    """The tensors of a checkpoint's files, all safetensors or all by ``torch.save``.

    Raises:
        CheckpointError: a file is truncated or something else; the message names it.
    """
    return TorchReader(files) if files and files[0].suffix != ".safetensors" else ShardReader(files)


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """All tensors of some files by name, from their headers alone.

    Raises:
        CheckpointError: as for :func:`open_files`.
    """
    with open_files(files) as reader:
        return {name: StoredTensor(*reader.describe(name)) for name in reader.names()}


def check_index(index: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse files that lack a tensor which the index beside them promises; without an index there is no promise.

    Raises:
        CheckpointError: names the index and the tensor.
    """
    if not index.is_file():
        return
    for name, file in read_json(index).get("weight_map", {}).items():
        if name not in stored:
            raise CheckpointError(f"{index} says that {file} holds {name}, which it does not")


def check_layers(stored: Mapping[str, StoredTensor], layout: Layout, where: Path) -> dict[str, tuple[int, int]]:
    """N and K of every quantized layer by name, after a check that its tensors are those of the layout.

    Raises:
        CheckpointError: names the first layer whose tensors do not fit, or says that there is none.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    layers = {name: parts for name, parts in sorted(modules.items()) if layout.packed in parts}
    if not layers:
        raise CheckpointError(f"{where} says that it is {layout.label} but holds no {layout.packed} tensor")
    features = {}
    for name, parts in layers.items():
        try:
            features[name] = layout.check(parts)
        except ValueError as error:
            raise CheckpointError(f"{where}: {name}: {error}") from None
    of_layers = {part for parts in layers.values() for part in parts} - {"bias"}
    for name, parts in sorted(modules.items()):
        beside = {part for part in parts if part in of_layers and not _is_activation_scale(part, parts[part])}
        if name not in layers and beside:
            raise CheckpointError(f"{where}: {name}: {', '.join(sorted(beside))} without {layout.packed}")
    return features


def activation_scales(stored: Mapping[str, StoredTensor]) -> list[str]:
    """The tensors that AWQ divides the output of activation functions by (``ScaledActivation``)."""
    return [name for name, tensor in stored.items() if _is_activation_scale(name.rpartition(".")[2], tensor)]


def _is_activation_scale(part: str, tensor: StoredTensor) -> bool:
    return part == "scales" and len(tensor.shape) == 1


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights of a model: tokenizer, processor, generation settings, code, licence.

    Configuration, weights, the record, hidden files and folders are not copied.
    """
    ours = ("config.json", OLD_CONFIG, RECORD)
    for file in sorted(source.iterdir()):
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not file.name.startswith(".") and file.name not in ours and not weights:
            shutil.copyfile(file, target / file.name)


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file of a model directory.

    Raises:
        CheckpointError: the file is not there, or holds something else; the message names it.
    """
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected an object")
    return loaded
