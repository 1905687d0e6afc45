"""Model directories: written whole or not at all, and described."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernelgraft_core.quant.formats.autoawq import pack_gemm
from kernelgraft_core.quant.w4a16.weight import W4A16Weight
from kernelgraft_core.runtime.errors import CheckpointError

RECORD = "kernelgraft.json"
INDEX = "model.safetensors.index.json"


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


def write_awq(
    directory: Path, model: Any, tokenizer: Any, weights: Mapping[str, W4A16Weight], record: dict[str, Any],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fill a directory with an AutoAWQ GEMM checkpoint: safetensors, config, tokenizer and the record.

    Args:
        model: holds everything that is not in ``weights``; that is stored as ``dtype``.
        weights: by layer name.
        record: what ``kernelgraft inspect`` shows.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors = {name: tensor for name, tensor in _float_tensors(model, dtype) if name.rpartition(".")[0] not in weights}
    for name, weight in weights.items():
        tensors |= {
            f"{name}.{part}": t for part, t in zip(("qweight", "qzeros", "scales"), pack_gemm(weight), strict=True)
        }
        bias = getattr(model.get_submodule(name), "bias", None)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach().to(dtype)
    shards = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors")
    for file, names in shards.filename_to_tensors.items():
        save_file({n: tensors[n].contiguous() for n in names}, directory / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": record["group_size"],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / RECORD).write_text(json.dumps(record, indent=2))


def _float_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    tied = getattr(model, "_tied_weights_keys", None) or ()
    skip = set(tied) if getattr(model.config, "tie_word_embeddings", False) else set()
    for name, tensor in model.state_dict().items():
        if name not in skip:
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def load_model(name: str, dtype: torch.dtype | str) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` for inference, from a directory or a hub name.

    Raises:
        CheckpointError: a file is truncated; OSError: the model cannot be read.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except SafetensorError as error:
        raise CheckpointError(f"{name} holds a file that is not whole: {error}") from None


def describe(directory: Path) -> dict[str, Any]:
    """What a model directory holds, from its files alone: no tensor is read.

    Returns:
        ``config`` (the model's ``quantization_config`` or None, type, layers), ``record`` (ours or None), ``tensors``
        (count and bytes by dtype) and ``bytes`` on disk.

    Raises:
        CheckpointError: no config, a truncated or missing safetensors file, or packed tensors that do not fit the
            quantization_config; the message names the file.
    """
    config = _read_json(directory / "config.json")
    record = _read_json(directory / RECORD) if (directory / RECORD).exists() else None
    files = sorted(directory.glob("*.safetensors"))
    if (directory / INDEX).exists():
        named = set(_read_json(directory / INDEX).get("weight_map", {}).values())
        if absent := sorted(named - {file.name for file in files}):
            raise CheckpointError(f"{directory / INDEX} names {', '.join(absent)}, which is not there")
    if not files:
        raise CheckpointError(f"{directory} holds no .safetensors file")
    stored = read_headers(files)
    by_dtype: dict[str, dict[str, int]] = {}
    for tensor in stored.values():
        row = by_dtype.setdefault(tensor.dtype, {"tensors": 0, "elements": 0})
        row["tensors"] += 1
        row["elements"] += torch.Size(tensor.shape).numel()
    quantization = config.get("quantization_config")
    if quantization and quantization.get("quant_method") == "awq":
        check_awq_tensors(stored, quantization.get("group_size", quantization.get("q_group_size", 128)), directory)
    return {
        "path": str(directory),
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "quantization_config": quantization,
        "tensors": by_dtype,
        "quantized_layers": sum(name.endswith(".qweight") for name in stored),
        "bytes": sum(file.stat().st_size for file in files),
        "record": record,
    }


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read: dtype as safetensors calls it (``"I32"``, ``"F16"``) and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of some safetensors files by name, from their headers alone.

    Raises:
        CheckpointError: a file is truncated or something else; the message names it.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (safe_open is no mapping)
                    piece = handle.get_slice(name)
                    stored[name] = StoredTensor(piece.get_dtype(), tuple(piece.get_shape()))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None
    return stored


def check_awq_tensors(stored: Mapping[str, StoredTensor], group_size: Any, where: Path) -> None:
    """Refuse tensors that contradict the group size in the ``quantization_config`` beside them, or each other.

    Raises:
        CheckpointError: names the first layer whose tensors do not fit, or says that there is none.
    """
    if not isinstance(group_size, int) or group_size < -1 or group_size == 0:
        raise CheckpointError(f"{where}: quantization_config has group_size = {group_size!r}")
    layers = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    if not layers:
        raise CheckpointError(f"{where} says quant_method 'awq' but holds no qweight tensor")
    for layer in layers:
        packed = stored[f"{layer}.qweight"]
        if packed.dtype != "I32" or len(packed.shape) != 2:
            raise CheckpointError(f"{where}: {layer}.qweight is {packed.dtype} {packed.shape}, expected I32 (K, N / 8)")
        k, words = packed.shape
        groups = 1 if group_size == -1 else k // group_size
        for part, dtypes, wanted in (
            ("qzeros", ("I32",), (groups, words)),
            ("scales", ("F16", "BF16", "F32"), (groups, words * 8)),
        ):
            found = stored.get(f"{layer}.{part}")
            if found is None or found.shape != wanted or found.dtype not in dtypes:
                raise CheckpointError(
                    f"{where}: {layer}.{part} is {f'{found.dtype} {found.shape}' if found else 'missing'}, but qweight "
                    f"{packed.shape} with group size {group_size} goes with {' or '.join(dtypes)} {wanted}"
                )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected an object")
    return loaded
