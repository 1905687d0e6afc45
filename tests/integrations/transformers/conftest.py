"""One tiny checkpoint, quantized once, and damaged copies of it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import kernelgraft
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

GROUP = 32


@pytest.fixture(autouse=True)
def one_thread(reproducible):
    """Small products on a busy machine wait longer for a second thread than they take."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Quantized:
    """A checkpoint, the record it came with, and a float32 model with the very numbers that it stores."""

    directory: Path
    record: dict[str, Any]
    model: Any


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    return Calibration(samples=4, length=48, seed=1)


def stored_numbers(source: Any) -> Any:
    """The quantized model, with everything that is not quantized rounded to what the checkpoint holds of it."""
    model = copy.deepcopy(source.model)
    for name, tensor in model.state_dict().items():
        if not (name.startswith("model.layers") and name.endswith("proj.weight")):
            tensor.copy_(tensor.to(source.dtype))
    return model


@pytest.fixture(scope="session")
def quantized(float_llama, words, calibration, tmp_path_factory) -> Quantized:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, directory = load_source(str(float_llama)), tmp_path_factory.mktemp("quantized") / "model"
    record = quantize_checkpoint(source, directory, words, text_name="words", group_size=GROUP, calibration=calibration)
    torch.set_num_threads(threads)
    return Quantized(directory, record, stored_numbers(source))


@pytest.fixture
def plugin():
    with kernelgraft.load_plugin("awq", host="transformers") as handle:
        yield handle


@pytest.fixture
def damaged(quantized, tmp_path) -> Callable[..., Path]:
    """``damaged(config=..., tensors=..., file=...)``: a copy of the checkpoint with one of its parts edited.

    ``config`` gets the quantization_config, ``tensors`` the tensors by name and ``file`` the path of the safetensors
    file; each changes what it gets.
    """

    def damage(config=None, tensors=None, file=None) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(quantized.directory, directory)
        if config:
            settings = json.loads((directory / "config.json").read_text())
            config(settings["quantization_config"])
            (directory / "config.json").write_text(json.dumps(settings))
        weights = directory / "model.safetensors"
        if tensors:
            content = load_file(weights)
            tensors(content)
            save_file(content, weights, metadata={"format": "pt"})
        if file:
            file(weights)
        return directory

    return damage
