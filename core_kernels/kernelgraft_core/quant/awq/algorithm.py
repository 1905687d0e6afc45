"""AWQ on one decoder block: scales, then grids, then integers. RTN and GPTQ are the same without the searches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, fold, linear_layer
from kernelgraft_core.quant.group_statistics import moments_by_group, watch_groups
from kernelgraft_core.quant.moments import relative_error
from kernelgraft_core.quant.outcome import BlockOutcome, LayerReport, Method, SearchReport
from kernelgraft_core.quant.rounding import Grid, Scheme, fake_quantize, split_groups
from kernelgraft_core.quant.runner import BlockResult, quantize_model
from kernelgraft_core.quant.sequential import BlockInputs
from kernelgraft_core.quant.weights import QuantizedWeight, pack_weight

from .grids import GridSearch, Rounding
from .probe import CallRecorder, ModuleProbe
from .scales import ScaleChoice, search_scales


@dataclass(frozen=True)
class AwqConfig:
    """How to quantize.

    Attributes:
        scheme: bits, group size, symmetric or not.
        scale_points: grid points of the scale search; 0 switches it off.
        clip_steps, refine_sweeps, rounding, damping: how integers are found
            (:class:`~kernelgraft_core.quant.awq.grids.GridSearch`). Refinement is not in the paper. Without scales,
            clipping and GPTQ it is round-to-nearest.
        clip_all: search the grids of queries and keys too. The paper leaves them out; by exact errors it gains.
        search_tokens: calibration tokens that judge a scale; 16 times as many tell the magnitudes that candidates are
            made from. Everything else uses all tokens.

    Raises:
        ValueError: a number is negative or ``rounding`` is unknown.
    """

    scheme: Scheme = field(default_factory=Scheme)
    scale_points: int = 20
    clip_steps: int = 10
    clip_all: bool = True
    refine_sweeps: int = 1
    rounding: Rounding = "nearest"
    damping: float = 0.01
    search_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("scale_points", "search_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        _ = self.search

    @property
    def search(self) -> GridSearch:
        return GridSearch(self.clip_steps, self.refine_sweeps, self.rounding, self.damping)


def quantize_awq(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], config: AwqConfig
) -> Iterator[BlockResult]:
    """:func:`~kernelgraft_core.quant.runner.quantize_model` with AWQ."""
    return quantize_model(model, batches, AwqMethod(config), scheme_group_size=config.scheme.group_size)


class AwqMethod(Method):
    """The method for :mod:`kernelgraft_core.quant.runner`."""

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
        self._where = architecture, block, path
        self._inputs, self._config, self._scheme = inputs, config, config.scheme
        self._groups = architecture.scale_groups(block)
        self._layers = {name: linear_layer(block, name) for group in self._groups for name in group.targets}

    def run(self) -> BlockOutcome:
        choices = self._search_scales()
        weights: dict[str, QuantizedWeight] = {}
        reports: list[LayerReport] = []
        for group, moments in moments_by_group(*self._where, self._groups, self._inputs):
            for name in group.targets:
                full_name = f"{self._path}.{name}"
                weights[full_name], errors = self._quantize(name, moments, choices.get(group))
                choice = choices.get(group) or ScaleChoice.identity(moments[0])
                reports.append(LayerReport(full_name, *errors, choice.form, choice.exponent))
        return BlockOutcome(weights, tuple(reports), tuple(self._searches(choices)))

    def _search_scales(self) -> dict[ScaleGroup, ScaleChoice]:
        """Search the scales of every group that has a source, and fold them into it and the group's layers."""
        searched = [group for group in self._groups if group.source is not None and self._config.scale_points]
        if not searched:
            return {}
        inputs = self._inputs.spread(self._config.search_tokens, 16)
        judges = {g.inspect: (g.per_token, self._block.get_submodule(g.inspect)) for g in searched}
        recorder = CallRecorder(
            {name: module for name, (per_token, module) in judges.items() if per_token},
            {name: module for name, (per_token, module) in judges.items() if not per_token},
            self._config.search_tokens,
            inputs.tokens,
        )
        with recorder:
            statistics = watch_groups(*self._where, searched, inputs, second_moments=False)
        return {group: self._scale(group, statistics[group].mean_abs, recorder) for group in searched}

    def _scale(self, group: ScaleGroup, mean_abs: Tensor, recorder: CallRecorder) -> ScaleChoice:
        layers = [self._layers[name] for name in group.targets]
        probe = ModuleProbe(self._block.get_submodule(group.inspect), layers, recorder.calls(group.inspect))
        weights = [layer.weight.data for layer in layers]
        choice = search_scales(weights, mean_abs, probe.error, scheme=self._scheme, points=self._config.scale_points)
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight * choice.scales
        assert group.source is not None
        fold(self._block, group.source, group.followers, choice.scales)
        return choice

    def _quantize(
        self, name: str, moments: Tensor, choice: ScaleChoice | None
    ) -> tuple[QuantizedWeight, tuple[float, float]]:
        """The packed weight, and the relative errors of plain rounding and of what was found."""
        config, layer = self._config, self._layers[name]
        weight = layer.weight.data
        groups = split_groups(weight, self._scheme.group_size)
        clip = config.clip_all or not name.endswith(self._architecture.unclipped)
        grid, integers = config.search.run(groups, moments, partial(Grid.spanning, scheme=self._scheme), clip=clip)
        values = grid.values(integers).view_as(weight)
        errors = self._rounding_error(weight, moments, choice), relative_error(values - weight, weight, moments)
        layer.weight.data = values
        return pack_weight(integers.flatten(1), grid.scales, grid.zeros, self._scheme.bits), errors

    def _rounding_error(self, weight: Tensor, moments: Tensor, choice: ScaleChoice | None) -> float:
        """Of the weight as it was before it was scaled."""
        scales = 1 if choice is None else choice.scales
        rounded = fake_quantize(weight / scales, self._scheme) * scales
        return relative_error(rounded.sub_(weight), weight, moments)

    def _searches(self, choices: Mapping[ScaleGroup, ScaleChoice]) -> Iterator[SearchReport]:
        for group, choice in choices.items():
            if group.source is not None:
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
    return AwqConfig(scheme, scale_points=0, clip_steps=0, refine_sweeps=0)


def gptq_config(scheme: Scheme) -> AwqConfig:
    """GPTQ (Frantar et al., arXiv 2210.17323): AWQ without its searches, but for the rounding.

    Layers of a block see what its inputs make of the block before any of its weights is rounded, as long as
    their second moments fit together; the variant that rounds layer after layer was measured to gain nothing.
    """
    return AwqConfig(scheme, scale_points=0, clip_steps=0, refine_sweeps=0, rounding="gptq")


def awq_gptq_config(scheme: Scheme) -> AwqConfig:
    """AWQ's scales and grids, and GPTQ's rounding."""
    return AwqConfig(scheme, rounding="gptq")
