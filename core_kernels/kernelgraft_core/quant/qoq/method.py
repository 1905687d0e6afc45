"""QoQ on one decoder block: rotation, smoothing, reordering, then integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention
from kernelgraft_core.quant.awq.grids import GridSearch, Rounding
from kernelgraft_core.quant.moments import InputStatistics, relative_error, within
from kernelgraft_core.quant.outcome import BlockOutcome, LayerReport, Method, TensorChange
from kernelgraft_core.quant.ranks import all_max
from kernelgraft_core.quant.rounding import Grid, Scheme, split_groups
from kernelgraft_core.quant.sequential import BlockInputs, watch_inputs, watch_outputs
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.runtime.errors import NonFiniteError, UnsupportedModelError

from .progressive import ProgressiveGrid, ZeroForm, row_scale
from .reorder import channel_order, head_order, reorder_heads, reorder_inner
from .rotation import around_blocks, rotate_block, rotate_heads
from .serving import as_served
from .smoothing import (
    attention_scales,
    output_scales,
    smooth_attention,
    smooth_output,
    smooth_values,
    value_scales,
)
from .turn import Turn

MOMENTS_LIMIT = 512 << 20  # bytes of second moments that are held at once
KEYS = "keys"

Exponents = tuple[float, float]


@dataclass(frozen=True)
class QoqConfig:
    """How to quantize; every step can be left out. :func:`qoq_config` knows what suits a scheme.

    Attributes:
        scheme: 4 bits, asymmetric; group size -1 is the per-channel variant.
        rotate: turn the residual stream (:mod:`.rotation`).
        rotate_heads: turn the channels of every head between values and attention output.
        smooth_attention: the exponent of SmoothAttention (:mod:`.smoothing`); 0 leaves it out.
        smooth_output: the exponents of activation and weight for the inputs of the last layer of an MLP;
            ``smooth_values`` those for the attention output's. Zeros leave it out.
        reorder: sort the input channels of attention output and last layer of an MLP (:mod:`.reorder`).
        zero: zero points before (``"pre"``) or after scaling groups to int8 (``"post"``); groups only.
        weight_bits: 4; None transforms and rounds no weight.
        clip_steps, refine_sweeps, rounding, damping: how integers are found
            (:class:`~kernelgraft_core.quant.awq.grids.GridSearch`).
        activation_bits, cache_bits: 8 and 4: layers are calibrated on activations, keys and values that are rounded as
            they will be when the model is served (:mod:`.serving`). None leaves them as they are.

    Raises:
        ValueError: a setting is none of these.
    """

    scheme: Scheme = field(default_factory=Scheme)
    rotate: bool = True
    rotate_heads: bool = True
    smooth_attention: float = 0.5
    smooth_output: Exponents = (0.3, 0.7)
    smooth_values: Exponents = (0.0, 0.0)
    reorder: bool = True
    zero: ZeroForm = "post"
    weight_bits: int | None = 4
    clip_steps: int = 20
    refine_sweeps: int = 1
    rounding: Rounding = "gptq"
    damping: float = 0.01
    activation_bits: int | None = 8
    cache_bits: int | None = 4

    def __post_init__(self) -> None:
        if self.scheme.bits != 4 or self.scheme.symmetric:
            raise ValueError(f"QoQ has asymmetric weights of 4 bits, not {self.scheme}")
        if self.zero not in ("pre", "post"):
            raise ValueError(f"zero is {self.zero!r}, expected 'pre' or 'post'")
        for name, bits in (("weight_bits", 4), ("activation_bits", 8), ("cache_bits", 4)):
            if getattr(self, name) not in (bits, None):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {bits} or None")
        for name in ("smooth_output", "smooth_values"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected two exponents")
        _ = self.search

    @property
    def search(self) -> GridSearch:
        return GridSearch(self.clip_steps, self.refine_sweeps, self.rounding, self.damping)


def qoq_config(scheme: Scheme) -> QoqConfig:
    """The steps that suit groups, or whole rows."""
    if scheme.group_size == -1:
        return QoqConfig(scheme, smooth_output=(0.1, 0.9), reorder=False)
    return QoqConfig(scheme)


class QoqMethod(Method):
    """The method for :mod:`kernelgraft_core.quant.runner`."""

    def __init__(self, config: QoqConfig) -> None:
        self.config = config

    def around(self, architecture: Architecture, model: Any) -> Mapping[str, TensorChange]:
        for block in architecture.block_list(model):
            self._check_attention(architecture, block)
        return around_blocks(architecture, model) if self.config.rotate else {}

    def as_served(self, architecture: Architecture, block: nn.Module) -> AbstractContextManager[None]:
        config = self.config
        return as_served(
            architecture, [block], activations=config.activation_bits is not None, cache=config.cache_bits is not None
        )

    def quantize_block(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs
    ) -> BlockOutcome:
        attention = architecture.attention(block) if architecture.attention else None
        if self.config.rotate:
            rotate_block(architecture, block)
        if self.config.rotate_heads and attention is not None:
            rotate_heads(block, attention)
        _Smoother(architecture, block, path, attention, self.config).run(inputs)
        with self.as_served(architecture, block):
            return _Rounder(architecture, block, path, self.config).run(inputs)

    def _check_attention(self, architecture: Architecture, block: nn.Module) -> None:
        """Refuse what cannot be done to the heads of a block."""
        config = self.config
        if not (config.rotate_heads or config.smooth_attention or any(config.smooth_values)):
            return
        if architecture.attention is None:
            raise UnsupportedModelError(
                f"the {architecture.name} adapter does not say where attention heads are; settings rotate_heads=False, "
                "smooth_attention=0, smooth_values=(0, 0)"
            )
        attention = architecture.attention(block)
        if config.smooth_attention and attention.rotary and attention.interleaved:
            raise UnsupportedModelError(
                "keys with interleaved rotary embeddings cannot be smoothed; settings smooth_attention=0"
            )
        if config.rotate_heads:
            try:
                Turn(attention.head_size)
            except ValueError as error:
                raise UnsupportedModelError(f"heads cannot be rotated: {error}; settings rotate_heads=False") from None


class _Smoother:
    """Smoothing and reordering of one block, by the largest magnitudes of its activations."""

    def __init__(
        self,
        architecture: Architecture,
        block: nn.Module,
        path: str,
        attention: Attention | None,
        config: QoqConfig,
    ) -> None:
        self._architecture, self._block, self._path = architecture, block, path
        self._attention, self._config = attention, config
        # The last layers of MLPs: something other than the residual stream or attention makes their inputs.
        self._inner = [group for group in architecture.scale_groups(block) if group.producers]

    def run(self, inputs: BlockInputs) -> None:
        config, attention = self._config, self._attention
        watched = self._watched_layers()
        keys = self._watched_keys()
        if not watched and not keys:
            return
        largest = self._largest(watched, keys, inputs)
        if attention is not None and keys:
            found = largest[KEYS]
            # The norm of keys gives the channels of one head.
            found = found.repeat(attention.kv_heads) if attention.k_norm else found[attention.k.index(found.device)]
            smooth_attention(self._block, attention, attention_scales(attention, found, config.smooth_attention))
        if attention is not None and attention.output in largest:
            self._attention_output(attention, largest[attention.output])
        for group in self._inner:
            if group.targets[0] in largest:
                self._inner_layer(group, largest[group.targets[0]])

    def _watched_layers(self) -> dict[str, nn.Module]:
        config, names = self._config, []
        if self._attention is not None and (config.reorder or any(config.smooth_values)):
            names.append(self._attention.output)
        if config.reorder or any(config.smooth_output):
            names += [group.targets[0] for group in self._inner]
        return {name: linear_layer(self._block, name) for name in names}

    def _watched_keys(self) -> dict[str, nn.Module]:
        attention = self._attention
        if attention is None or not self._config.smooth_attention:
            return {}
        return {KEYS: self._block.get_submodule(attention.k_norm or attention.k.module)}

    def _largest(
        self, layers: Mapping[str, nn.Module], keys: Mapping[str, nn.Module], inputs: BlockInputs
    ) -> dict[str, Tensor]:
        """The largest magnitude of every input channel of ``layers`` and every output channel of ``keys``."""
        largest: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            found = x.reshape(-1, x.shape[-1]).abs().amax(0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        with self._architecture.calibrating(self._block), watch_inputs(layers, see), watch_outputs(keys, see):
            inputs.run(self._block)
        for name, values in largest.items():
            all_max(values)
            if not torch.isfinite(values).all():
                raise NonFiniteError(f"activations of {self._path}.{name} are not finite")
        return largest

    def _attention_output(self, attention: Attention, largest: Tensor) -> None:
        config = self._config
        if any(config.smooth_values):
            weight = linear_layer(self._block, attention.output).weight
            scales = value_scales(attention, largest, weight, config.smooth_values)
            smooth_values(self._block, attention, scales)
            largest = largest / scales.repeat_interleave(attention.heads // attention.kv_heads, 0).flatten()
        if config.reorder:
            reorder_heads(self._block, attention, head_order(attention, largest))

    def _inner_layer(self, group: ScaleGroup, largest: Tensor) -> None:
        name, config = group.targets[0], self._config
        if any(config.smooth_output) and group.source is not None:
            scales = output_scales(largest, linear_layer(self._block, name).weight, config.smooth_output)
            smooth_output(self._block, group.source, name, scales)
            largest = largest / scales
        if config.reorder:
            reorder_inner(self._block, group.producers, name, channel_order(largest))


class _Rounder:
    """Integers for the layers of one block, whose transforms are done."""

    def __init__(self, architecture: Architecture, block: nn.Module, path: str, config: QoqConfig) -> None:
        self._architecture, self._block, self._path, self._config = architecture, block, path, config

    def run(self, inputs: BlockInputs) -> BlockOutcome:
        if self._config.weight_bits is None:
            return BlockOutcome({}, ())
        weights: dict[str, W4A8Weight] = {}
        reports: list[LayerReport] = []
        sizes = [
            (group, 4 * linear_layer(self._block, group.targets[0]).in_features ** 2)
            for group in self._architecture.scale_groups(self._block)
        ]
        for groups in within(sizes, MOMENTS_LIMIT):
            for group, moments in self._moments(groups, inputs):
                for name in group.targets:
                    weight, report = self._quantize(name, moments)
                    weights[report.name] = weight
                    reports.append(report)
        return BlockOutcome(dict(weights), tuple(reports))

    def _moments(self, groups: Sequence[ScaleGroup], inputs: BlockInputs) -> Iterator[tuple[ScaleGroup, Tensor]]:
        """Second moments of what the layers of each group read."""
        layers = {group.targets[0]: linear_layer(self._block, group.targets[0]) for group in groups}
        statistics = {name: InputStatistics(layer.in_features, layer.weight.device) for name, layer in layers.items()}
        with (
            self._architecture.calibrating(self._block),
            watch_inputs(layers, lambda name, x: statistics[name].add(x)),
        ):
            inputs.run(self._block)
        for group in groups:
            seen = statistics.pop(group.targets[0])
            seen.gather()
            seen.check(f"{self._path}.{group.targets[0]}")
            yield group, seen.take_moments()

    def _quantize(self, name: str, moments: Tensor) -> tuple[W4A8Weight, LayerReport]:
        layer, scheme = linear_layer(self._block, name), self._config.scheme
        original = layer.weight.data
        groups = split_groups(original, scheme.group_size)
        ends = groups.amin(-1), groups.amax(-1)
        search = self._config.search
        if scheme.group_size == -1:
            channel, integers = search.run(groups, moments, partial(Grid.spanning, scheme=scheme))
            nearest, values = Grid.spanning(*ends, scheme).reproduce(groups), channel.values(integers)
            q, scale, zero = integers.flatten(1), channel.scales.flatten(), channel.zeros.flatten()
            weight = W4A8Weight.from_integers(q, scale, zero=zero)
        else:
            span = partial(ProgressiveGrid.spanning, row=row_scale(groups), zero=self._config.zero)
            grid, integers = search.run(groups, moments, span)
            nearest, values, weight = span(*ends).reproduce(groups), grid.values(integers), grid.pack(integers)
        before, after = (
            relative_error(found.view_as(original) - original, original, moments) for found in (nearest, values)
        )
        layer.weight.data = values.view_as(original)
        return weight, LayerReport(f"{self._path}.{name}", before, after)
