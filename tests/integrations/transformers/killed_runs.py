"""Kills quantizations at one step of the file system after the other, goes on with each, and prints what came of it.

    python killed_runs.py SOURCE DIRECTORY FIRST STRIDE SETTINGS

SETTINGS are JSON: arguments of ``quantize_checkpoint``, ``old`` (whether a model stands where the new one goes) and
``after`` (other arguments for the run after the kill). Every run is a fork of this process, which has imported and read
everything: what takes seconds is done once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

TEXT = " ".join(f"w{(i * i + 7 * i) % 96}" for i in range(400))
STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir")


def die_at(point: int) -> Callable[[], int]:
    """Kill this process just before its step number ``point``; the returned function gives the steps so far."""
    seen = [0]

    def step() -> None:
        if seen[0] == point:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, stepping(getattr(os, name)))
    save = safetensors.torch.save_file

    def save_in_two_steps(tensors: Any, file: Any, **options: Any) -> None:
        step()
        if seen[0] == point:
            save(tensors, file, **options)
            os.truncate(file, os.path.getsize(file) // 2)
        step()
        save(tensors, file, **options)

    safetensors.torch.save_file = save_in_two_steps
    return lambda: seen[0]


def run(source: Any, out: Path, point: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """One quantization in a fork: the blocks it did and its steps, or None when it was killed."""
    report = out.parent / "report"
    child = os.fork()
    if not child:
        try:
            steps, blocks = die_at(point), []
            calibration = Calibration(samples=2, length=16)
            quantize_checkpoint(
                source, out, TEXT, calibration=calibration, overwrite=True,
                on_block=lambda block: blocks.append(block.index), **settings,
            )  # fmt: skip
            report.write_text(json.dumps({"blocks": blocks, "steps": steps()}))
            os._exit(0)
        except BaseException as error:
            report.write_text(json.dumps({"error": repr(error)}))
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    found: dict[str, Any] = json.loads(report.read_text())
    report.unlink()
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """All files, the record without the time it took."""
    found = {p.name: p.read_bytes() for p in directory.iterdir()}
    record = json.loads(found["kernelgraft.json"])
    record.pop("seconds")
    return found | {"kernelgraft.json": json.dumps(record).encode()}


def main() -> None:
    torch.set_num_threads(1)
    source, directory, first, stride = load_source(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    settings = json.loads(sys.argv[5])
    old, after = settings.pop("old", False), settings.pop("after", {})
    never = run(source, directory / "never", -1, settings | after)
    assert never is not None
    wanted = contents(directory / "never")
    results = []
    for point in range(first, sys.maxsize, stride):
        place = directory / f"at-{point}"
        place.mkdir()
        out = place / "out"
        if old:
            out.mkdir()
            (out / "config.json").write_text("old")
        finished = run(source, out, point, settings)
        if finished is not None:
            break
        left = {p.name for p in out.iterdir()} if out.exists() else None
        resumed = run(source, out, -1, settings | after)
        results.append(
            {
                "point": point, "left": sorted(left) if left is not None else None, "resumed": resumed,
                "same": out.exists() and contents(out) == wanted, "beside": sorted(p.name for p in place.iterdir()),
            }
        )  # fmt: skip
        shutil.rmtree(place)
    print(json.dumps({"steps": never["steps"], "files": sorted(wanted), "results": results}))


if __name__ == "__main__":
    main()
