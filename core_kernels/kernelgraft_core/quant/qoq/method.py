"""QoQ on one decoder block: transforms, then integers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, linear_layer
from kernelgraft_core.quant.group_statistics import moments_by_group
from kernelgraft_core.quant.moments import relative_error
from kernelgraft_core.quant.outcome import BlockOutcome, LayerReport, Method, TensorChange
from kernelgraft_core.quant.rounding import Grid, split_groups
from kernelgraft_core.quant.sequential import BlockInputs
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .config import QoqConfig
from .progressive import ProgressiveGrid, row_scale
from .rotation import around_blocks
from .serving import as_served
from .transforms import transform_block
from .turn import Turn


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
        transform_block(architecture, block, path, self.config, inputs)
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


class _Rounder:
    """Integers for the layers of one block, whose transforms are done."""

    def __init__(self, architecture: Architecture, block: nn.Module, path: str, config: QoqConfig) -> None:
        self._architecture, self._block, self._path, self._config = architecture, block, path, config

    def run(self, inputs: BlockInputs) -> BlockOutcome:
        if self._config.weight_bits is None:
            return BlockOutcome({}, ())
        weights: dict[str, W4A8Weight] = {}
        reports: list[LayerReport] = []
        groups = self._architecture.scale_groups(self._block)
        for group, moments in moments_by_group(self._architecture, self._block, self._path, groups, inputs):
            for name in group.targets:
                weight, report = self._quantize(name, moments)
                weights[report.name] = weight
                reports.append(report)
        return BlockOutcome(dict(weights), tuple(reports))

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
