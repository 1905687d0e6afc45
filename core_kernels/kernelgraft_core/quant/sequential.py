"""Run a decoder one block at a time over calibration batches, watching the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.errors import NonFiniteError


@dataclass
class BlockInputs:
    """What a decoder block is called with, one entry per calibration batch."""

    hidden: list[Tensor] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)

    def through(self, block: nn.Module) -> BlockInputs:
        """The inputs of the next block."""
        return BlockInputs(
            [_first(block(h, **kw)) for h, kw in zip(self.hidden, self.kwargs, strict=True)], self.kwargs
        )

    def take(self, tokens: int) -> BlockInputs:
        """The first batches that hold at least ``tokens`` tokens."""
        taken, seen = 0, 0
        for hidden in self.hidden:
            if seen >= tokens:
                break
            seen += hidden.shape[0] * hidden.shape[1]
            taken += 1
        return BlockInputs(self.hidden[:taken], self.kwargs[:taken])

    def spread(self, tokens: int, factor: int = 4) -> BlockInputs:
        """Batches, evenly spread, of about ``factor * tokens`` tokens: to draw ``tokens`` scattered ones from."""
        step = max(1, self.tokens // max(1, factor * tokens))
        return BlockInputs(self.hidden[::step], self.kwargs[::step])

    @property
    def tokens(self) -> int:
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)


class _Reached(Exception):
    """The first block was reached; nothing behind it needs to run."""


def capture_block_inputs(model: nn.Module, first_block: nn.Module, batches: Iterable[Tensor]) -> BlockInputs:
    """Run ``model`` up to ``first_block``, which is not run, for token batches ``(B, T)`` int64."""
    inputs = BlockInputs()

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        inputs.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        inputs.kwargs.append(kwargs)
        raise _Reached

    hook = first_block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(input_ids=batch, use_cache=False)
            except _Reached:
                continue
    finally:
        hook.remove()
    return inputs


@contextmanager
def watch_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``see(name, x)`` gets the first argument of every call of the named modules."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class InputStatistics:
    """Second moments of the input of one linear layer, gathered token by token.

    Attributes:
        mean_abs: ``(K,)`` mean of ``|x|`` over tokens, float32.
        moments: ``(K / g, g, g)`` mean of ``x x^T`` inside each group, float32. It gives the mean squared error of any
            change of a group of weights without touching the tokens again.
    """

    def __init__(self, features: int, group_size: int, device: torch.device) -> None:
        groups = features // group_size
        self._absolute = torch.zeros(features, device=device)
        self._products = torch.zeros(groups, group_size, group_size, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1]).float()
        self._absolute += tokens.abs().sum(0)
        by_group = tokens.view(len(tokens), *self._products.shape[:2]).transpose(0, 1)
        self._products.baddbmm_(by_group.transpose(1, 2), by_group)
        self.tokens += len(tokens)

    @property
    def mean_abs(self) -> Tensor:
        return self._absolute / max(self.tokens, 1)

    @property
    def moments(self) -> Tensor:
        return self._products / max(self.tokens, 1)

    def moments_of_scaled(self, scales: Tensor) -> Tensor:
        """The moments of ``x / scales``, for scales ``(K,)``."""
        by_group = scales.view(self._products.shape[:2])
        return self.moments / (by_group.unsqueeze(2) * by_group.unsqueeze(1))

    def check(self, layer: str) -> None:
        """Raise NonFiniteError when a NaN or an infinity has passed through."""
        if not torch.isfinite(self._absolute).all():
            bad = int((~torch.isfinite(self._absolute)).sum())
            raise NonFiniteError(f"activations of {layer} are not finite in {bad} of {len(self._absolute)} channels")


def _first(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
