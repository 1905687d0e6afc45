"""What the sparse convolutions of a model do with a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .kernel_map import KernelMap
from .nn.conv import SparseConvolution


@dataclass(frozen=True)
class RunLayer:
    """One layer on one sample."""

    name: str
    known: KernelMap
    weight: Tensor
    bias: Tensor | None
    activation: str
    dtype: torch.dtype


def kernel_maps(model: nn.Module, sample: Any) -> list[KernelMap]:
    """The maps that a model's layers use for a sample.

    Sites that a layer makes, and maps to them, live as long as somebody has them. Compiled code makes none: keep these
    while ``torch.compile(fullgraph=True)`` runs a model on the same coordinates.

    Args:
        sample: what the model is called with: one argument, or a tuple or dict of several. It runs once.
    """
    return [layer.known for layer in watch(model, sample)]


def watch(model: nn.Module, sample: Any) -> list[RunLayer]:
    """Every layer that has a map, as the model comes by it."""
    seen: list[RunLayer] = []

    def note(name: str) -> Callable[..., None]:
        def hook(layer: SparseConvolution, args: tuple[Any, ...], output: Any) -> None:
            if not layer.pointwise:
                known = layer.map_of(args[0].coordinates)
                seen.append(RunLayer(name, known, layer.weight, layer.bias, layer.activation, output.feats.dtype))

        return hook

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in model.named_modules()
        if isinstance(layer, SparseConvolution)
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()  # maps are the same, and no norm learns of the sample
    try:
        with torch.no_grad():
            if isinstance(sample, dict):
                model(**sample)
            elif isinstance(sample, tuple):
                model(*sample)
            else:
                model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return seen
