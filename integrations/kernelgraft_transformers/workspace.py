"""What a quantization has done so far, kept beside its destination so that a killed one goes on where it was."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, distributed

from kernelgraft_core.quant.ranks import rank, world_size

log = logging.getLogger("kernelgraft")

JOB, LOCK = "job.json", "lock"


class Workspace:
    """A directory that holds finished blocks and the hidden states that enter the next one.

    Every file appears whole, by renaming, and what a block was made from goes only when the next block is complete:
    whatever moment a process dies at, the directory says exactly where to go on, and going on gives the same bytes as
    never having stopped. Each rank keeps hidden states of its own; rank 0 keeps the blocks.

    A context manager: inside, no other process can open the directory. The operating system sees to that, so that a
    process that dies leaves it free.

    Args:
        path: the directory; :func:`workspace_of` names it.
        job: everything that the result depends on. A directory that was left by another job is emptied.
        on_disk: read hidden states from disk whenever they are used, instead of holding all of them in memory.

    Raises:
        BlockingIOError: another process is at work there.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, on_disk: bool = False) -> None:
        self.path, self._on_disk = path, on_disk
        text = json.dumps(job, indent=1, sort_keys=True)
        if rank() == 0:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path / LOCK)
            if any(path.iterdir()) and (not (path / JOB).is_file() or (path / JOB).read_text() != text):
                self._delete()
            _write_text(path / JOB, text)
        _barrier()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if rank() == 0:
            if kind is not None and issubclass(kind, ValueError):
                # What the user has to change makes it another job; disk full, Ctrl-C and the like keep what was done.
                # While the lock is held: afterwards the directory may be another process's.
                self._delete()
                shutil.rmtree(self.path, ignore_errors=True)
            self._lock.release()

    def resume(self) -> tuple[int, Sequence[Tensor]] | None:
        """The block to go on with and what enters it; None when there is nothing to go on from."""
        blocks = 0
        while self.block_file(blocks).is_file():
            blocks += 1
        kept = [index for index in range(blocks + 1) if self._hidden_directory(index).is_dir()]
        index = max(kept, default=0)
        if world_size() > 1:
            at = torch.tensor(index)
            distributed.all_reduce(at, op=distributed.ReduceOp.MIN)
            index = int(at)
        return (index, self._read(index)) if index else None

    def keep(self, index: int, hidden: Iterable[Tensor]) -> Sequence[Tensor]:
        """See :class:`kernelgraft_core.quant.runner.Activations`."""
        from safetensors.torch import save_file

        final = self._hidden_directory(index)
        fresh = final.with_suffix(f"{final.suffix}.partial")
        for stale in (fresh, final):
            shutil.rmtree(stale, ignore_errors=True)
        fresh.mkdir()
        held: list[Tensor] = []
        for number, tensor in enumerate(hidden):
            save_file({"hidden": tensor.contiguous()}, fresh / f"{number:05}.safetensors")
            if not self._on_disk:
                held.append(tensor)
        os.rename(fresh, final)
        # One generation back stays: another rank may have died before it got this far.
        shutil.rmtree(self._hidden_directory(index - 2), ignore_errors=True)
        return self._read(index) if self._on_disk else held

    def block_file(self, index: int) -> Path:
        return self.path / f"block-{index:05}.safetensors"

    def save_block(self, index: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Store what the checkpoint will hold of a block, and what its report needs."""
        from safetensors.torch import save_file

        if rank() == 0:
            fresh = self.block_file(index).with_suffix(".partial")
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, fresh, metadata={"notes": json.dumps(notes)})
            os.replace(fresh, self.block_file(index))

    def notes(self, index: int) -> dict[str, Any]:
        """What :meth:`save_block` was given."""
        with safe_open(self.block_file(index), framework="pt") as handle:
            found: dict[str, Any] = json.loads(handle.metadata()["notes"])
        return found

    def remove(self) -> None:
        """Delete the directory."""
        _barrier()
        if rank() == 0:
            self._delete()
            shutil.rmtree(self.path, ignore_errors=True)

    def _delete(self) -> None:
        # The job first: what is left of a directory that is half deleted must not look like one to go on from.
        (self.path / JOB).unlink(missing_ok=True)
        for kept in self.path.iterdir():
            if kept.is_dir():
                shutil.rmtree(kept, ignore_errors=True)
            elif kept.name != LOCK:
                kept.unlink()

    def _hidden_directory(self, index: int) -> Path:
        return self.path / f"hidden-{index:05}.rank{rank()}"

    def _read(self, index: int) -> Sequence[Tensor]:
        stored = StoredTensors(sorted(self._hidden_directory(index).glob("*.safetensors")))
        return stored if self._on_disk else list(stored)


class StoredTensors(Sequence[Tensor]):
    """Tensors in files of their own, read each time one is used."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> StoredTensors: ...
    def __getitem__(self, index: int | slice) -> Tensor | StoredTensors:
        if isinstance(index, slice):
            return StoredTensors(self._files[index])
        with safe_open(self._files[index], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor("hidden")
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def workspace_of(out: Path) -> Path:
    """Where the quantization that will become ``out`` keeps what it has done."""
    return out.parent / f".{out.name}.quantizing"


def _locked(path: Path) -> BaseFileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another process is at work in {path.parent}; wait for it, or stop it") from None
    return lock


def _write_text(path: Path, text: str) -> None:
    fresh = path.with_suffix(".partial")
    fresh.write_text(text)
    os.replace(fresh, path)


def _barrier() -> None:
    if world_size() > 1:
        distributed.barrier()
