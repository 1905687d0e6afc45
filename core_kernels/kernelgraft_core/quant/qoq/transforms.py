"""Everything that QoQ does to a block before it rounds weights: rotation, smoothing, reordering."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention
from kernelgraft_core.quant.ranks import all_max
from kernelgraft_core.quant.sequential import BlockInputs, watch_inputs, watch_outputs
from kernelgraft_core.runtime.errors import NonFiniteError

from .config import QoqConfig
from .reorder import channel_order, head_order, reorder_heads, reorder_inner
from .rotation import rotate_block, rotate_heads
from .smoothing import (
    attention_scales,
    output_scales,
    smooth_attention,
    smooth_output,
    smooth_values,
    value_scales,
)

KEYS = "keys"


def transform_block(
    architecture: Architecture, block: nn.Module, path: str, config: QoqConfig, inputs: BlockInputs
) -> None:
    """Transform a block in place, such that it computes what it did on inputs that are turned if ``config.rotate``.

    Raises:
        NonFiniteError: activations hold NaN or infinity; the message names the layer.
    """
    attention = architecture.attention(block) if architecture.attention else None
    if config.rotate:
        rotate_block(architecture, block)
    if config.rotate_heads and attention is not None:
        rotate_heads(block, attention)
    _Smoother(architecture, block, path, attention, config).run(inputs)


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
