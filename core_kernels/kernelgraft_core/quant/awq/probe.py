"""How much a module's output suffers when its linear layers get other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.ranks import all_sum_float

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


class CallRecorder:
    """A context manager that keeps some calls of modules while a block runs over the calibration batches.

    Args:
        per_token: modules that treat every token by itself; of these, rows from all over the calibration text are kept.
            Modules that see the same tensor share the copy.
        whole: modules that mix tokens; of these, the first calls.
        tokens: how many calibration tokens to judge by, and out of how many.
    """

    def __init__(
        self, per_token: Mapping[str, nn.Module], whole: Mapping[str, nn.Module], tokens: int, total: int
    ) -> None:
        self._per_token, self._whole, self._tokens = per_token, whole, tokens
        self._step = max(1, total // max(1, tokens))
        self._rows: dict[str, list[Tensor]] = {name: [] for name in per_token}
        self._seen = dict.fromkeys([*per_token, *whole], 0)
        self._calls: dict[str, Calls] = {name: [] for name in whole}
        self._last: tuple[Tensor | None, int, Tensor | None] = (None, 0, None)
        self._stack = ExitStack()

    def __enter__(self) -> CallRecorder:
        for modules, see in ((self._per_token, self._see_rows), (self._whole, self._see_call)):
            for name, module in modules.items():
                hook = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name, see=see: see(name, args, kwargs), with_kwargs=True
                )
                self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._last = (None, 0, None)

    def calls(self, name: str) -> Calls:
        """What was kept of a module."""
        if name in self._calls:
            return self._calls[name]
        return [((torch.cat(self._rows[name]).unsqueeze(0),), {})]

    def _see_rows(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0]
        first = -self._seen[name] % self._step
        self._seen[name] += x.shape[:-1].numel()
        source, start, kept = self._last
        if source is not x or start != first or kept is None:
            kept = x.flatten(0, -2)[first :: self._step].clone()
            self._last = (x, first, kept)
        self._rows[name].append(kept)

    def _see_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen[name] < self._tokens:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            self._seen[name] += hidden.shape[:-1].numel()
            self._calls[name].append((args, kwargs))


class ModuleProbe:
    """A module's outputs for some calls, with the weights it has now.

    Args:
        module: whose output counts.
        layers: the linear layers in it whose weights are going to vary.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Linear], calls: Calls) -> None:
        self._module, self._layers, self._calls = module, layers, calls
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
