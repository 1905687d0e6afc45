"""How much a module's output suffers when its linear layers get other weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.ranks import all_sum_float
from kernelgraft_core.quant.sequential import BlockInputs


class ModuleProbe:
    """Holds calls of one module of a block and its outputs with the weights it has now.

    Args:
        block: the block that is run to see the calls.
        inspect: name of the module in it.
        layers: the linear layers whose weights are going to vary.
        tokens: how many calibration tokens to judge by.
        per_token: take them from all over the calibration text; a module that mixes tokens needs whole sequences.
    """

    def __init__(
        self,
        block: nn.Module,
        inspect: str,
        layers: Sequence[nn.Linear],
        inputs: BlockInputs,
        tokens: int,
        *,
        per_token: bool,
    ) -> None:
        self._module, self._layers = block.get_submodule(inspect), layers
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = self._module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            (inputs.spread(tokens) if per_token else inputs.take(tokens)).run(block)
        finally:
            hook.remove()
        if per_token:
            rows = torch.cat([args[0].flatten(0, -2) for args, _ in seen])
            seen = [((rows[:: max(1, len(rows) // tokens)].unsqueeze(0),), {})]
        self._calls = seen
        self._wanted = self._outputs()

    def error(self, weights: Sequence[Tensor]) -> float:
        """Mean squared change of the output with ``weights``; the layers get their own back."""
        own = [layer.weight.data for layer in self._layers]
        try:
            for layer, weight in zip(self._layers, weights, strict=True):
                layer.weight.data = weight
            outputs = self._outputs()
        finally:
            for layer, weight in zip(self._layers, own, strict=True):
                layer.weight.data = weight
        change = sum(float((a - b).square().sum()) for a, b in zip(outputs, self._wanted, strict=True))
        return all_sum_float(change) / all_sum_float(sum(wanted.numel() for wanted in self._wanted))

    def _outputs(self) -> list[Tensor]:
        found = [self._module(*args, **kwargs) for args, kwargs in self._calls]
        return [out if isinstance(out, Tensor) else out[0] for out in found]
