"""AWQ over a whole decoder, one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, find_architecture
from kernelgraft_core.quant.rounding import Grid, split_groups
from kernelgraft_core.quant.sequential import BlockInputs, InputStatistics, capture_block_inputs, watch_inputs
from kernelgraft_core.quant.w4a16.weight import W4A16Weight
from kernelgraft_core.runtime.errors import NonFiniteError

from .clip import search_grid
from .probe import ModuleProbe
from .scales import ScaleChoice, fold_into_source, search_scales


@dataclass(frozen=True)
class AwqConfig:
    """How to quantize.

    Attributes:
        group_size: weights per scale along K; -1 is the whole row.
        scale_points: grid points of the scale search; 0 switches it off.
        clip_steps: steps of the clip search; 0 switches it off (with ``scale_points=0`` that is round-to-nearest).
        search_tokens: calibration tokens that judge a scale. The clip search uses all of them.
    """

    group_size: int = 128
    scale_points: int = 20
    clip_steps: int = 10
    search_tokens: int = 1024
    through: str = "quantized"
    both: bool = True
    gqa: bool = True
    clip_qk: bool = False


@dataclass(frozen=True)
class LayerReport:
    """Relative squared error of a layer's output over the calibration tokens, rounded to nearest and after AWQ."""

    name: str
    error_before: float
    error_after: float
    form: str
    exponent: float


@dataclass(frozen=True)
class BlockResult:
    """One quantized block; the model already holds the rounded values."""

    index: int
    count: int
    weights: dict[str, W4A16Weight]
    reports: tuple[LayerReport, ...]


@torch.no_grad()
def quantize_awq(model: nn.Module, batches: Iterable[Tensor], config: AwqConfig) -> Iterator[BlockResult]:
    """Quantize the decoder blocks of ``model`` in place, yielding each as it is done.

    After the last block the model computes in floating point exactly what the packed weights stand for: norms carry the
    folded scales, linear layers the rounded values.

    Args:
        model: a causal language model of a known family (:mod:`kernelgraft_core.quant.architectures`), float32.
        batches: token ids ``(1, T)`` int64, on the model's device.

    Raises:
        UnsupportedModelError: no adapter knows the model.
        NonFiniteError: weights or activations of a layer hold NaN or infinity; the message names it.
        ValueError: the group size does not divide a layer's K, or there are no batches.
    """
    architecture = find_architecture(model)
    blocks = architecture.block_list(model)
    _check_layers(architecture, blocks, config.group_size)
    inputs = capture_block_inputs(model, blocks[0], batches)
    if not inputs.hidden:
        raise ValueError("no calibration batches were given")
    for index, block in enumerate(blocks):
        quantizer = _BlockQuantizer(architecture, block, f"{architecture.blocks}.{index}", inputs, config)
        weights, reports = quantizer.run()
        yield BlockResult(index, len(blocks), weights, reports)
        # Later blocks see what the quantized ones really produce, so that they can make up for it.
        inputs = inputs.through(block) if config.through == "quantized" else quantizer.outputs


class _BlockQuantizer:
    """Scales, then grids, then packed weights of one block."""

    def __init__(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs, config: AwqConfig
    ) -> None:
        self._architecture, self._block, self._path = architecture, block, path
        self._inputs, self._config = inputs, config
        self._groups = architecture.scale_groups(block)
        self._layers = {name: _linear(block, name) for group in self._groups for name in group.targets}
        self._originals = {name: layer.weight.data for name, layer in self._layers.items()}

    def run(self) -> tuple[dict[str, W4A16Weight], tuple[LayerReport, ...]]:
        statistics = self._watch()
        choices = {group: self._scale(group, statistics[group]) for group in self._groups}
        weights: dict[str, W4A16Weight] = {}
        reports: list[LayerReport] = []
        for group in self._groups:
            moments = statistics[group].moments
            by_group = choices[group].scales.view(moments.shape[:2])
            scaled_moments = moments / (by_group.unsqueeze(2) * by_group.unsqueeze(1))
            for name in group.targets:
                grid, after = self._round(name, scaled_moments)
                layer = self._layers[name]
                groups = split_groups(layer.weight.data, self._config.group_size)
                weights[f"{self._path}.{name}"] = W4A16Weight.from_integers(
                    grid.round(groups).flatten(1).to(torch.uint8), grid.scales, grid.zeros.to(torch.uint8)
                )
                layer.weight.data = grid.reproduce(groups).view_as(layer.weight)
                before = _relative_error(self._originals[name], _plain_grid, moments, self._config.group_size)
                choice = choices[group]
                reports.append(LayerReport(f"{self._path}.{name}", before, after, choice.form, choice.exponent))
        return weights, tuple(reports)

    def _watch(self) -> dict[ScaleGroup, InputStatistics]:
        statistics: dict[str, InputStatistics] = {}
        for group in self._groups:
            layer = self._layers[group.targets[0]]
            size = layer.in_features if self._config.group_size == -1 else self._config.group_size
            statistics[group.targets[0]] = InputStatistics(layer.in_features, size, layer.weight.device)
        watched = {name: self._layers[name] for name in statistics}
        with watch_inputs(watched, lambda name, x: statistics[name].add(x)):
            self.outputs = self._inputs.through(self._block)
        for name, seen in statistics.items():
            seen.check(f"{self._path}.{name}")
        return {group: statistics[group.targets[0]] for group in self._groups}

    def _scale(self, group: ScaleGroup, statistics: InputStatistics) -> ScaleChoice:
        layers = [self._layers[name] for name in group.targets]
        probe = ModuleProbe(
            self._block, group.inspect, layers, self._inputs, self._config.search_tokens, per_token=group.per_token
        )
        weights = [layer.weight.data for layer in layers]
        points = self._config.scale_points if self._config.gqa or group.repeats == 1 else 0
        choice = search_scales(
            weights,
            statistics.mean_abs,
            probe.error,
            group_size=self._config.group_size,
            points=points,
            repeats=group.repeats,
            head_dim=group.head_dim,
        )
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight * choice.scales
        fold_into_source(self._block.get_submodule(group.source), choice.scales, group.repeats, group.head_dim)
        return choice

    def _round(self, name: str, moments: Tensor) -> tuple[Grid, float]:
        weight = self._layers[name].weight.data
        size = self._config.group_size
        clipped = self._config.clip_steps and (self._config.clip_qk or not name.endswith(self._architecture.unclipped))

        def choose(groups: Tensor) -> Grid:
            if not clipped:
                return _plain_grid(groups)
            return search_grid(weight, moments, group_size=size, steps=self._config.clip_steps, both=self._config.both)

        return choose(split_groups(weight, size)), 0.0


def _plain_grid(groups: Tensor) -> Grid:
    return Grid.spanning(groups.amin(-1), groups.amax(-1))


def _relative_error(weight: Tensor, choose, moments: Tensor, group_size: int) -> float:
    return 0.0


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _check_layers(architecture: Architecture, blocks: Sequence[nn.Module], group_size: int) -> None:
    for index, block in enumerate(blocks):
        for group in architecture.scale_groups(block):
            for name in group.targets:
                weight = _linear(block, name).weight
                try:
                    split_groups(weight, group_size)
                except ValueError as error:
                    raise ValueError(f"{architecture.blocks}.{index}.{name}: {error}") from None
                if not torch.isfinite(weight).all():
                    bad = int((~torch.isfinite(weight)).sum())
                    raise NonFiniteError(
                        f"weights of {architecture.blocks}.{index}.{name} are not finite in {bad} places"
                    )
