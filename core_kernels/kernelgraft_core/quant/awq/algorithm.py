"""AWQ on one decoder block: scales, then grids, then packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, fold, linear_layer
from kernelgraft_core.quant.outcome import BlockOutcome, LayerReport, SearchReport
from kernelgraft_core.quant.rounding import Scheme, nearest_grid, split_groups
from kernelgraft_core.quant.runner import BlockResult, quantize_model
from kernelgraft_core.quant.sequential import BlockInputs, InputStatistics, watch_inputs
from kernelgraft_core.quant.weights import QuantizedWeight, pack_weight

from .clip import output_error, search_grid
from .probe import CallRecorder, ModuleProbe
from .scales import ScaleChoice, search_scales


@dataclass(frozen=True)
class AwqConfig:
    """How to quantize.

    Attributes:
        scheme: bits, group size, symmetric or not.
        scale_points: grid points of the scale search; 0 switches it off.
        clip_steps: steps of the clip search; 0 switches it off (without scales that is round-to-nearest).
        search_tokens: calibration tokens that judge a scale. The clip search uses all of them.
    """

    scheme: Scheme = field(default_factory=Scheme)
    scale_points: int = 20
    clip_steps: int = 10
    search_tokens: int = 512


def quantize_awq(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], config: AwqConfig
) -> Iterator[BlockResult]:
    """:func:`~kernelgraft_core.quant.runner.quantize_model` with AWQ."""
    return quantize_model(model, batches, AwqMethod(config), scheme_group_size=config.scheme.group_size)


class AwqMethod:
    """The method for :mod:`kernelgraft_core.quant.runner`; see :class:`~kernelgraft_core.quant.outcome.Method`."""

    def __init__(self, config: AwqConfig) -> None:
        self.config = config

    def quantize_block(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs
    ) -> BlockOutcome:
        return _BlockQuantizer(architecture, block, path, inputs, self.config).run()


class _BlockQuantizer:
    def __init__(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs, config: AwqConfig
    ) -> None:
        self._architecture, self._block, self._path = architecture, block, path
        self._inputs, self._config, self._scheme = inputs, config, config.scheme
        self._groups = architecture.scale_groups(block)
        self._layers = {name: linear_layer(block, name) for group in self._groups for name in group.targets}
        searched = [group for group in self._groups if group.source is not None and config.scale_points]
        judges = {g.inspect: (g.per_token, block.get_submodule(g.inspect)) for g in searched}
        self._recorder = CallRecorder(
            {name: module for name, (per_token, module) in judges.items() if per_token},
            {name: module for name, (per_token, module) in judges.items() if not per_token},
            config.search_tokens,
            inputs.tokens,
        )

    def run(self) -> BlockOutcome:
        statistics = self._watch()
        before = {name: self._rounding_error(name, statistics[group]) for group, name in self._pairs()}
        choices = {group: self._scale(group, statistics[group]) for group in self._groups}
        weights: dict[str, QuantizedWeight] = {}
        reports: list[LayerReport] = []
        for group, name in self._pairs():
            layer, choice = self._layers[name], choices[group]
            moments = statistics[group].moments_of_scaled(choice.scales)
            groups = split_groups(layer.weight.data, self._scheme.group_size)
            if self._config.clip_steps and not name.endswith(self._architecture.unclipped):
                grid = search_grid(groups, moments, self._scheme, steps=self._config.clip_steps)
            else:
                grid = nearest_grid(groups, self._scheme)
            after = output_error(groups, grid, moments)
            full_name = f"{self._path}.{name}"
            reports.append(LayerReport(full_name, before[name], after, choice.form, choice.exponent))
            weights[full_name] = pack_weight(grid.round(groups).flatten(1), grid.scales, grid.zeros, self._scheme.bits)
            layer.weight.data = grid.reproduce(groups).view_as(layer.weight)
        return BlockOutcome(weights, tuple(reports), tuple(self._searches(choices)))

    def _pairs(self) -> Iterator[tuple[ScaleGroup, str]]:
        return ((group, name) for group in self._groups for name in group.targets)

    def _watch(self) -> dict[ScaleGroup, InputStatistics]:
        """Statistics of every group's input, while the block still computes in full precision."""
        statistics: dict[str, InputStatistics] = {}
        for group in self._groups:
            layer = self._layers[group.targets[0]]
            size = layer.in_features if self._scheme.group_size == -1 else self._scheme.group_size
            statistics[group.targets[0]] = InputStatistics(layer.in_features, size, layer.weight.device)
        watched = {name: self._layers[name] for name in statistics}
        with (
            self._architecture.calibrating(self._block),
            watch_inputs(watched, lambda name, x: statistics[name].add(x)),
            self._recorder,
        ):
            self._inputs.run(self._block)
        for name, seen in statistics.items():
            seen.gather()
            seen.check(f"{self._path}.{name}")
        return {group: statistics[group.targets[0]] for group in self._groups}

    def _rounding_error(self, name: str, statistics: InputStatistics) -> float:
        groups = split_groups(self._layers[name].weight.data, self._scheme.group_size)
        return output_error(groups, nearest_grid(groups, self._scheme), statistics.moments)

    def _scale(self, group: ScaleGroup, statistics: InputStatistics) -> ScaleChoice:
        """Search a group's scales and fold them into its source and its targets."""
        layers = [self._layers[name] for name in group.targets]
        if not self._config.scale_points or group.source is None:
            return ScaleChoice.identity(statistics.mean_abs)
        probe = ModuleProbe(self._block.get_submodule(group.inspect), layers, self._recorder.calls(group.inspect))
        weights = [layer.weight.data for layer in layers]
        choice = search_scales(
            weights, statistics.mean_abs, probe.error, scheme=self._scheme, points=self._config.scale_points
        )
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight * choice.scales
        fold(self._block, group.source, group.followers, choice.scales)
        return choice

    def _searches(self, choices: Mapping[ScaleGroup, ScaleChoice]) -> Iterator[SearchReport]:
        for group, choice in choices.items():
            if choice.curve and group.source is not None:
                yield SearchReport(
                    f"{self._path}.{group.source.module}",
                    tuple(f"{self._path}.{name}" for name in group.targets),
                    f"{self._path}.{group.inspect}",
                    choice.plain_error,
                    choice.error,
                    choice.curve,
                )


def rtn_config(scheme: Scheme) -> AwqConfig:
    """Round-to-nearest: AWQ without its searches."""
    return AwqConfig(scheme, scale_points=0, clip_steps=0)
