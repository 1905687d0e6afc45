"""One tiny checkpoint, quantized once, what checkpoints hold read by plain definitions, and damaged copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import kernelgraft
from kernelgraft_core.quant.formats.autoawq import unpack_gemm
from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.w3a16 import W3A16Weight
from kernelgraft_core.quant.w4a16 import W4A16Weight
from kernelgraft_core.quant.weights import pack_weight
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

GROUP = 32
PARTS = ("qweight", "qhigh", "scales", "qzeros", "zeros")


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


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, packed layers unpacked to float32 weights."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    settings = json.loads((directory / "config.json").read_text()).get("quantization_config")
    for layer in sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        parts = {
            name: stored.pop(f"{layer}.{name}", None) for name in ("qweight", "qhigh", "scales", "qzeros", "zeros")
        }
        stored[f"{layer}.weight"] = _unpacked(parts, settings)
    return stored


def _unpacked(parts: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    scales, zeros = parts["scales"], parts["zeros"]
    if settings["quant_method"] == "awq":
        weight = unpack_gemm(parts["qweight"], parts["qzeros"], scales)
    else:
        if zeros is None:
            zeros = torch.full(scales.shape, 2 ** (settings["bits"] - 1), dtype=torch.uint8)
        planes = [parts["qweight"]] if settings["bits"] == 4 else [parts["qweight"], parts["qhigh"]]
        weight = (W4A16Weight if settings["bits"] == 4 else W3A16Weight)(*planes, scales, zeros)
    q = weight.integers().float().view(*weight.scales.shape, -1)
    return ((q - weight.zeros.float().unsqueeze(-1)) * weight.scales.float().unsqueeze(-1)).flatten(1)


def stored_numbers(directory: Path) -> Any:
    """A float32 model that computes with exactly what a checkpoint stores."""
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(stored_tensors(directory), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


@pytest.fixture(scope="session")
def quantized(float_llama, words, calibration, tmp_path_factory) -> Quantized:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, directory = load_source(str(float_llama)), tmp_path_factory.mktemp("quantized") / "model"
    record = quantize_checkpoint(source, directory, words, text_name="words", group_size=GROUP, calibration=calibration)
    torch.set_num_threads(threads)
    return Quantized(directory, record, stored_numbers(directory))


@pytest.fixture
def plugin():
    with kernelgraft.load_plugin("awq", host="transformers") as handle:
        yield handle


@pytest.fixture
def edited(tmp_path) -> Callable[..., Path]:
    """``edited(directory, config=..., tensors=..., file=...)``: a copy of a checkpoint with one of its parts edited.

    ``config`` gets the quantization_config, ``tensors`` the tensors by name and ``file`` the path of the safetensors
    file; each changes what it gets.
    """

    def edit(source: Path, config=None, tensors=None, file=None) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(source, directory)
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

    return edit


@pytest.fixture
def damaged(quantized, edited) -> Callable[..., Path]:
    """``edited`` of the checkpoint ``quantized``."""
    return partial(edited, quantized.directory)


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """``pack(source, layout, skipped)``: plain rounding of a model's projections, experts included, written directly.

    Returns the checkpoint and a float32 one of the same numbers, both under the names that ``source`` uses.
    """

    def write(source: Path, layout: Layout, skipped: list[str] | None = None) -> tuple[Path, Path]:
        tensors = load_file(source / "model.safetensors")
        packed, exact = {}, {}
        for name, tensor in tensors.items():
            layer = name.removesuffix(".weight")
            kept = any(f".{pattern}." in f".{layer}." for pattern in skipped or ())
            if not layer.endswith(("_proj", ".w1", ".w2", ".w3")) or kept or name == layer:
                packed[name], exact[name] = tensor.half(), tensor.half().float()
                continue
            groups = tensor.float().view(len(tensor), layout.groups(tensor.shape[1]), -1)
            scales = (groups.abs().amax(2) / (layout.zero - 0.5)).half()
            zeros = torch.full(scales.shape, layout.zero)
            if not layout.symmetric:
                zeros = zeros + torch.arange(scales.numel()).view_as(scales) % 2
            q = (groups / scales.float()[..., None]).round() + zeros[..., None]
            q = q.clamp(0, 2**layout.bits - 1)
            exact[name] = ((q - zeros[..., None]) * scales.float()[..., None]).flatten(1)
            weight = pack_weight(q.flatten(1).to(torch.uint8), scales, zeros, layout.bits)
            packed |= {f"{layer}.{part}": stored for part, stored in layout.write(weight).items()}
        made = []
        for kind, content in (("packed", packed), ("exact", exact)):
            made.append(tmp_path_factory.mktemp(kind))
            shutil.copytree(source, made[-1], dirs_exist_ok=True)
            save_file(content, made[-1] / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((source / "config.json").read_text())
        settings["quantization_config"] = layout.config(skipped)
        (made[0] / "config.json").write_text(json.dumps(settings))
        return made[0], made[1]

    return write


@pytest.fixture(scope="session")
def float_model() -> Callable[[Path], Any]:
    """``float_model(directory)``: see :func:`stored_numbers`."""
    return stored_numbers


@pytest.fixture(scope="session")
def float_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """``float_tensors(directory)``: see :func:`stored_tensors`."""
    return stored_tensors
