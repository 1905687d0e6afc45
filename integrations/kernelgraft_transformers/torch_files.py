"""Checkpoints that ``torch.save`` wrote: state dicts in ``.pt`` and ``.bin`` files."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from kernelgraft_core.runtime.errors import CheckpointError

from .shards import ShardKind

TORCH_INDEX = "pytorch_model.bin.index.json"


class TorchReader:
    """All tensors of some files by name, like :class:`~kernelgraft_transformers.shards.ShardReader`; a context manager.

    Files are mapped, and tensors are read when used. Only tensors are unpickled, never code.

    Raises:
        CheckpointError: a file is truncated, holds anything but named tensors, or is of a PyTorch before 1.6; the
            message names it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:  # a cut zip gives an OSError
                reason = str(error).partition("\n")[0]
                raise CheckpointError(f"{file} is not a whole file of tensors by torch.save: {reason}") from None
            if not isinstance(loaded, dict) or not loaded:
                raise CheckpointError(f"{file} holds a {type(loaded).__name__}, expected named tensors")
            for name, tensor in loaded.items():
                if not isinstance(tensor, Tensor):
                    raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}, expected a tensor")
                self._tensors[name] = tensor

    def __enter__(self) -> TorchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self._tensors = {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].clone()  # tied tensors share memory, which safetensors refuses

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape."""
        tensor = self._tensors[name]
        return tensor.dtype, tuple(tensor.shape)


def save_torch(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one file by ``torch.save``.

    Raises:
        OSError: it cannot be written.
    """
    # All of a tensor's memory is saved, more than its own where it is a view.
    own = {n: t if t.nbytes == t.untyped_storage().nbytes() else t.clone() for n, t in tensors.items()}
    try:
        torch.save(own, file)
    except RuntimeError as error:  # PyTorch's writer of zip files says so of a full disk
        raise OSError(f"{file.name} cannot be written: {str(error).partition(chr(10))[0]}") from None


TORCH_FILES = ShardKind("pytorch_model", ".bin", TORCH_INDEX, save_torch)
