"""AWQ over a whole decoder, one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, find_architecture, linear_layer
from kernelgraft_core.quant.rounding import Grid, split_groups
from kernelgraft_core.quant.sequential import BlockInputs, InputStatistics, capture_block_inputs, watch_inputs
from kernelgraft_core.quant.w4a16.weight import W4A16Weight
from kernelgraft_core.runtime.errors import NonFiniteError

from .clip import output_error, search_grid
from .probe import ModuleProbe
from .scales import ScaleChoice, fold_into_source, search_scales


@dataclass(frozen=True)
class AwqConfig:
    """How to quantize.

    Attributes:
        group_size: weights per scale along K; -1 is the whole row.
        scale_points: grid points of the scale search; 0 switches it off.
        clip_steps: steps of the clip search; 0 switches it off (without scales that is round-to-nearest).
        search_tokens: calibration tokens that judge a scale. The clip search uses all of them.
    """

    group_size: int = 128
    scale_points: int = 20
    clip_steps: int = 10
    search_tokens: int = 512


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        error_before, error_after: squared error of the output over the calibration tokens relative to the output's own
            square, with the original weight rounded to nearest, and now.
        form, exponent: the scales that were chosen (:class:`~kernelgraft_core.quant.awq.scales.ScaleChoice`).
    """

    name: str
    error_before: float
    error_after: float
    form: str
    exponent: float


@dataclass(frozen=True)
class BlockResult:
    """One quantized block: number ``index`` of ``count``, packed weights by layer name, and a report for each."""

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
    blocks = list(architecture.block_list(model))
    for index, block in enumerate(blocks):
        _check_layers(architecture, block, f"{architecture.blocks}.{index}", config.group_size)
    inputs = capture_block_inputs(model, blocks[0], batches)
    if not inputs.hidden:
        raise ValueError("no calibration batches were given")
    for index, block in enumerate(blocks):
        quantizer = _BlockQuantizer(architecture, block, f"{architecture.blocks}.{index}", inputs, config)
        weights, reports = quantizer.run()
        yield BlockResult(index, len(blocks), weights, reports)
        if index + 1 < len(blocks):
            # The next block is searched on what the quantized ones really produce, so that it can make up for it.
            inputs = inputs.through(block)


class _BlockQuantizer:
    """Scales, then grids, then packed weights of one block."""

    def __init__(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs, config: AwqConfig
    ) -> None:
        self._architecture, self._block, self._path = architecture, block, path
        self._inputs, self._config = inputs, config
        self._groups = architecture.scale_groups(block)
        self._layers = {name: linear_layer(block, name) for group in self._groups for name in group.targets}

    def run(self) -> tuple[dict[str, W4A16Weight], tuple[LayerReport, ...]]:
        size = self._config.group_size
        statistics = self._watch()
        before = {name: self._rounding_error(name, statistics[group]) for group, name in self._pairs()}
        choices = {group: self._scale(group, statistics[group]) for group in self._groups}
        weights: dict[str, W4A16Weight] = {}
        reports: list[LayerReport] = []
        for group, name in self._pairs():
            layer, choice = self._layers[name], choices[group]
            moments = statistics[group].moments_of_scaled(choice.scales)
            groups = split_groups(layer.weight.data, size)
            if self._config.clip_steps and not name.endswith(self._architecture.unclipped):
                grid = search_grid(groups, moments, steps=self._config.clip_steps)
            else:
                grid = Grid.spanning(groups.amin(-1), groups.amax(-1))
            after = output_error(groups, grid, moments)
            full_name = f"{self._path}.{name}"
            reports.append(LayerReport(full_name, before[name], after, choice.form, choice.exponent))
            weights[full_name] = W4A16Weight.from_integers(grid.round(groups).flatten(1), grid.scales, grid.zeros)
            layer.weight.data = grid.reproduce(groups).view_as(layer.weight)
        return weights, tuple(reports)

    def _pairs(self) -> Iterator[tuple[ScaleGroup, str]]:
        return ((group, name) for group in self._groups for name in group.targets)

    def _watch(self) -> dict[ScaleGroup, InputStatistics]:
        """Statistics of every group's input, while the block still computes in full precision."""
        statistics: dict[str, InputStatistics] = {}
        for group in self._groups:
            layer = self._layers[group.targets[0]]
            size = layer.in_features if self._config.group_size == -1 else self._config.group_size
            statistics[group.targets[0]] = InputStatistics(layer.in_features, size, layer.weight.device)
        with watch_inputs({name: self._layers[name] for name in statistics}, lambda name, x: statistics[name].add(x)):
            self._inputs.through(self._block)
        for name, seen in statistics.items():
            seen.check(f"{self._path}.{name}")
        return {group: statistics[group.targets[0]] for group in self._groups}

    def _rounding_error(self, name: str, statistics: InputStatistics) -> float:
        groups = split_groups(self._layers[name].weight.data, self._config.group_size)
        return output_error(groups, Grid.spanning(groups.amin(-1), groups.amax(-1)), statistics.moments)

    def _scale(self, group: ScaleGroup, statistics: InputStatistics) -> ScaleChoice:
        """Search a group's scales and fold them into its source and its targets."""
        layers = [self._layers[name] for name in group.targets]
        if not self._config.scale_points or group.source is None:
            return ScaleChoice.identity(statistics.mean_abs)
        probe = ModuleProbe(
            self._block, group.inspect, layers, self._inputs, self._config.search_tokens, per_token=group.per_token
        )
        weights = [layer.weight.data for layer in layers]
        choice = search_scales(
            weights,
            statistics.mean_abs,
            probe.error,
            group_size=self._config.group_size,
            points=self._config.scale_points,
        )
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight * choice.scales
        fold_into_source(self._block.get_submodule(group.source), choice.scales)
        return choice


def _check_layers(architecture: Architecture, block: nn.Module, path: str, group_size: int) -> None:
    for group in architecture.scale_groups(block):
        for name in group.targets:
            weight = linear_layer(block, name).weight
            try:
                split_groups(weight, group_size)
            except ValueError as error:
                raise ValueError(f"{path}.{name}: {error}") from None
            if not torch.isfinite(weight).all():
                bad = int((~torch.isfinite(weight)).sum())
                raise NonFiniteError(f"weights of {path}.{name} are not finite in {bad} of {weight.numel()} places")
