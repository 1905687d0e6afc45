"""Safetensors files of a model, read and written a shard at a time, so that a model need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernelgraft_core.runtime.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 1 << 30  # what writing a shard may take of memory

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class ShardReader:
    """All tensors of some safetensors files by name.

    Files are open only while something is read from them: pages of a mapped file count as memory of the process, and
    would add up to the whole model.

    Raises:
        CheckpointError: a file is truncated or something else; the message names it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118  (safe_open is no mapping)
                        piece = handle.get_slice(name)
                        if (kind := piece.get_dtype()) not in DTYPES:
                            raise CheckpointError(f"{file}: {name} has dtype {kind}; known are {', '.join(DTYPES)}")
                        self._files[name] = file
                        self._described[name] = DTYPES[kind], tuple(piece.get_shape())
            except SafetensorError as error:
                raise CheckpointError(f"{file.parent} holds a file that is not whole: {file.name}: {error}") from None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open; readers of other files hold what has to be let go of."""

    def names(self) -> list[str]:
        return list(self._files)

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape."""
        return self._described[name]

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors that are not read yet, as safetensors gives them, for as long as the block lasts."""
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            pieces: dict[str, Any] = {}
            for name in names:
                file = self._files[name]
                if file not in handles:
                    handles[file] = stack.enter_context(safe_open(file, framework="pt"))
                pieces[name] = handles[file].get_slice(name)
            yield pieces

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as handle:
            read: Tensor = handle.get_tensor(name)
        return read


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to be written: how many bytes it will take, and how to get it when its turn comes."""

    size: int
    get: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> PendingTensor:
        return cls(tensor.numel() * tensor.element_size(), lambda: tensor)


def save_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one file, contiguous.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name} cannot be written: {error}") from None


@dataclass(frozen=True)
class ShardKind:
    """Files that hold tensors by name: what they are called, and how one is written."""

    stem: str
    suffix: str
    index: str
    save: Callable[[dict[str, Tensor], Path], None]


SAFETENSORS = ShardKind("model", ".safetensors", INDEX, save_safetensors)


def write_shards(directory: Path, tensors: Mapping[str, PendingTensor], kind: ShardKind = SAFETENSORS) -> None:
    """Write ``model.safetensors``, or shards with an index, holding one shard in memory at a time.

    Raises:
        OSError: a file cannot be written.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, pending in tensors.items():
        if shards[-1] and filled + pending.size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += pending.size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        place = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        file = f"{kind.stem}{place}{kind.suffix}"
        kind.save({n: tensors[n].get() for n in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(p.size for p in tensors.values())}, "weight_map": weight_map}
        (directory / kind.index).write_text(json.dumps(index, indent=2))


def list_shards(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, without others that hold the same in another form.

    Raises:
        CheckpointError: there is none, or the index names one that is not there.
    """
    if (directory / WEIGHTS).is_file():  # as Transformers chooses
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        try:
            named = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / INDEX} is no index of safetensors files: {error}") from None
        if absent := [name for name in named if not (directory / name).is_file()]:
            raise CheckpointError(f"{directory / INDEX} names {', '.join(absent)}, which is not there")
        return [directory / name for name in named]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no .safetensors file; save the model with save_pretrained first")
    return files
