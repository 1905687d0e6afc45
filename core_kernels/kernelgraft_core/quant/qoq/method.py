"""QoQ on one decoder block: rotation, smoothing, reordering, then integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention
from kernelgraft_core.quant.awq.grids import GridSearch, Rounding
from kernelgraft_core.quant.moments import InputStatistics, relative_error, within
from kernelgraft_core.quant.outcome import BlockOutcome, LayerReport, TensorChange
from kernelgraft_core.quant.ranks import all_max
from kernelgraft_core.quant.rounding import Grid, Scheme, split_groups
from kernelgraft_core.quant.sequential import BlockInputs, watch_inputs, watch_outputs
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.runtime.errors import NonFiniteError, UnsupportedModelError

from .progressive import ProgressiveGrid, ZeroForm, row_scale
from .reorder import channel_order, head_order, reorder_heads, reorder_inner
from .rotation import around_blocks, check_rotation, rotate_block
from .smoothing import attention_scales, output_scales, smooth_attention, smooth_output

MOMENTS_LIMIT = 512 << 20  # bytes of second moments that are held at once


@dataclass(frozen=True)
class QoqConfig:
    """How to quantize; every step can be left out.

    Attributes:
        scheme: 4 bits, asymmetric; group size -1 is the per-channel variant.
        rotate: turn the residual stream, and the heads between values and attention output.
        smooth_attention: the exponent of SmoothAttention; 0 switches it off.
        smooth_output: the exponents of activation and weight for the inputs of a block's last layer; zeros switch it
            off.
        reorder: sort the input channels of attention output and down projection.
        zero: zero points before (``"pre"``) or after scaling groups to int8 (``"post"``); groups only.
        clip_steps, refine_sweeps, rounding, damping: how integers are found
            (:class:`~kernelgraft_core.quant.awq.grids.GridSearch`).
    """

    scheme: Scheme = field(default_factory=Scheme)
    rotate: bool = True
    smooth_attention: float = 0.5
    smooth_output: tuple[float, float] = (0.3, 0.7)
    reorder: bool = True
    zero: ZeroForm = "pre"
    clip_steps: int = 10
    refine_sweeps: int = 1
    rounding: Rounding = "gptq"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.scheme.bits != 4 or self.scheme.symmetric:
            raise ValueError(f"QoQ has asymmetric weights of 4 bits, not {self.scheme}")
        if self.zero not in ("pre", "post"):
            raise ValueError(f"zero is {self.zero!r}, expected 'pre' or 'post'")
        _ = self.search

    @property
    def search(self) -> GridSearch:
        return GridSearch(self.clip_steps, self.refine_sweeps, self.rounding, self.damping)


class QoqMethod:
    """The method for :mod:`kernelgraft_core.quant.runner`; see :class:`~kernelgraft_core.quant.outcome.Method`."""

    def __init__(self, config: QoqConfig) -> None:
        self.config = config

    def around(self, architecture: Architecture, model: Any) -> Mapping[str, TensorChange]:
        """What becomes of tensors outside the blocks, by name."""
        if self.config.smooth_attention and architecture.attention is None:
            raise UnsupportedModelError(
                f"the {architecture.name} adapter does not say where attention heads are; settings smooth_attention=0"
            )
        if not self.config.rotate:
            return {}
        check_rotation(architecture, model)
        return around_blocks(architecture, model)

    def quantize_block(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs
    ) -> BlockOutcome:
        return _BlockQuantizer(architecture, block, path, inputs, self.config).run()


class _BlockQuantizer:
    def __init__(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs, config: QoqConfig
    ) -> None:
        self._architecture, self._block, self._path = architecture, block, path
        self._inputs, self._config = inputs, config
        self._groups = architecture.scale_groups(block)
        self._attention: Attention | None = architecture.attention(block) if architecture.attention else None

    def run(self) -> BlockOutcome:
        if self._config.rotate:
            rotate_block(self._architecture, self._block, self._attention)
        self._smooth_and_sort()
        weights: dict[str, W4A8Weight] = {}
        reports: list[LayerReport] = []
        layers = {group: linear_layer(self._block, group.targets[0]) for group in self._groups}
        sizes = [(group, 4 * layer.in_features**2) for group, layer in layers.items()]
        for groups in within(sizes, MOMENTS_LIMIT):
            statistics = self._watch(groups)
            for group in groups:
                moments = statistics.pop(group).take_moments()
                for name in group.targets:
                    weight, report = self._quantize(name, moments)
                    weights[report.name] = weight
                    reports.append(report)
        return BlockOutcome(dict(weights), tuple(reports))

    def _smooth_and_sort(self) -> None:
        """One pass tells the largest magnitudes; everything here is done by them."""
        config, attention = self._config, self._attention
        keys = (attention.k_norm or attention.k.module) if attention is not None else None
        last = [group for group in self._groups if group.inspect == group.targets[0] and self._feeds_stream(group)]
        wanted = {group.targets[0]: linear_layer(self._block, group.targets[0]) for group in last}
        largest: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            found = x.reshape(-1, x.shape[-1]).abs().amax(0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        watched_keys = {"keys": self._block.get_submodule(keys)} if keys is not None and config.smooth_attention else {}
        with (
            self._architecture.calibrating(self._block),
            watch_inputs(wanted, see),
            watch_outputs(watched_keys, see),
        ):
            self._inputs.run(self._block)
        for name, values in largest.items():
            all_max(values)
            if not torch.isfinite(values).all():
                raise NonFiniteError(f"activations of {self._path}.{name} are not finite")
        if attention is not None and "keys" in largest:
            found = largest["keys"]
            if attention.k_norm is None:
                found = found[attention.k.index(found.device)]
            else:
                found = found.repeat(attention.kv_heads)  # the norm's output has one head's channels
            smooth_attention(self._block, attention, attention_scales(attention, found, config.smooth_attention))
        for group in last:
            name = group.targets[0]
            if attention is not None and name == attention.output:
                if config.reorder:
                    reorder_heads(self._block, attention, head_order(attention, largest[name]))
            elif group.source is not None:
                self._prepare_inner(group, largest[name])

    def _prepare_inner(self, group: ScaleGroup, largest: Tensor) -> None:
        assert group.source is not None
        name, (alpha, beta) = group.targets[0], self._config.smooth_output
        if alpha or beta:
            scales = output_scales(largest, linear_layer(self._block, name).weight, alpha, beta)
            smooth_output(self._block, group.source, name, scales)
            largest = largest / scales
        if self._config.reorder:
            reorder_inner(self._block, group.source, name, channel_order(largest))

    def _feeds_stream(self, group: ScaleGroup) -> bool:
        """Whether a group's layer is the last of attention or MLP, and no norm comes right in front of it."""
        if self._attention is not None and group.targets == (self._attention.output,):
            return True
        source = group.source
        return source is not None and isinstance(self._block.get_submodule(source.module), nn.Linear)

    def _watch(self, groups: Sequence[ScaleGroup]) -> dict[ScaleGroup, InputStatistics]:
        layers = {group.targets[0]: linear_layer(self._block, group.targets[0]) for group in groups}
        statistics = {name: InputStatistics(layer.in_features, layer.weight.device) for name, layer in layers.items()}
        with (
            self._architecture.calibrating(self._block),
            watch_inputs(layers, lambda name, x: statistics[name].add(x)),
        ):
            self._inputs.run(self._block)
        for name, seen in statistics.items():
            seen.gather()
            seen.check(f"{self._path}.{name}")
        return {group: statistics[group.targets[0]] for group in groups}

    def _quantize(self, name: str, moments: Tensor) -> tuple[W4A8Weight, LayerReport]:
        layer, scheme = linear_layer(self._block, name), self._config.scheme
        original = layer.weight.data
        groups = split_groups(original, scheme.group_size)
        if scheme.group_size == -1:
            channel, integers = self._config.search.run(groups, moments, partial(Grid.spanning, scheme=scheme))
            nearest = Grid.spanning(groups.amin(-1), groups.amax(-1), scheme).reproduce(groups)
            values = channel.values(integers)
            q, scale, zero = integers.flatten(1), channel.scales.flatten(), channel.zeros.flatten()
            weight = W4A8Weight.from_integers(q, scale, zero=zero)
        else:
            span = partial(ProgressiveGrid.spanning, row=row_scale(groups), zero=self._config.zero)
            grid, integers = self._config.search.run(groups, moments, span)
            nearest = span(groups.amin(-1), groups.amax(-1)).reproduce(groups)
            values, weight = grid.values(integers), grid.pack(integers)
        before, after = (
            relative_error(found.view_as(original) - original, original, moments) for found in (nearest, values)
        )
        layer.weight.data = values.view_as(original)
        return weight, LayerReport(f"{self._path}.{name}", before, after)
