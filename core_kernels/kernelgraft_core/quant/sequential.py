"""Run a decoder one block at a time over calibration batches, watching the inputs of its linear layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class BlockInputs:
    """What a decoder block is called with, one entry per calibration batch.

    Attributes:
        hidden: ``(B, T, H)`` each; any sequence, so that it may lie on disk.
        kwargs: the other arguments.
    """

    hidden: Sequence[Tensor] = field(default_factory=list)
    kwargs: Sequence[dict[str, Any]] = field(default_factory=list)

    def outputs(self, block: nn.Module) -> Iterator[Tensor]:
        """What the block makes of each batch, one at a time."""
        for hidden, kwargs in zip(self.hidden, self.kwargs, strict=True):
            yield _first(block(hidden, **kwargs))

    def run(self, block: nn.Module) -> None:
        """Call the block for what hooks see of it."""
        for _ in self.outputs(block):
            pass

    def take(self, tokens: int) -> BlockInputs:
        """The first batches that hold at least ``tokens`` tokens."""
        seen = 0
        for taken, hidden in enumerate(self.hidden):
            if seen >= tokens:
                return BlockInputs(self.hidden[:taken], self.kwargs[:taken])
            seen += hidden.shape[0] * hidden.shape[1]
        return self

    def spread(self, tokens: int, factor: int = 4) -> BlockInputs:
        """Batches, evenly spread, of about ``factor * tokens`` tokens: to draw ``tokens`` scattered ones from."""
        step = max(1, self.tokens // max(1, factor * tokens))
        return BlockInputs(self.hidden[::step], self.kwargs[::step])

    @property
    def tokens(self) -> int:
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)


@dataclass
class BlockCalls:
    """How a model calls its blocks, without what the blocks themselves compute.

    Attributes:
        first: hidden states that enter the first block, one per batch.
        kwargs: by block, then by batch. Blocks differ where layers of several kinds alternate, as in Gemma.
        between: by block, then by batch: what the model itself adds to the hidden states in front of a block, None
            where nothing. Qwen3-VL adds features of its vision tower there.
    """

    first: list[Tensor]
    kwargs: list[list[dict[str, Any]]]
    between: list[list[Tensor | None]]

    def inputs(self, index: int, hidden: Sequence[Tensor], device: torch.device | None = None) -> BlockInputs:
        """The inputs of block ``index``, whose hidden states are given, its other arguments moved to ``device``."""
        return BlockInputs(hidden, [_moved(kwargs, device) for kwargs in self.kwargs[index]])

    def entering(self, index: int, outputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """The hidden states that enter block ``index``, from the outputs of the block before, one at a time."""
        for out, extra in zip(outputs, self.between[index], strict=True):
            yield out if extra is None else out + extra.to(out.device, out.dtype)


class _Reached(Exception):
    """The last block was reached; nothing behind it needs to run."""


def capture_block_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> BlockCalls:
    """Run all of ``model`` but its blocks, which may lie on the meta device, and what follows them.

    While it runs, blocks give zeros, so that whatever enters the next one was added on the way.

    Args:
        batches: keyword arguments of the model, ``input_ids`` int64 ``(B, T)`` among them.
    """
    calls = BlockCalls([], [[] for _ in blocks], [[] for _ in blocks])

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                calls.first.append(hidden)
            calls.kwargs[index].append(kwargs)
            calls.between[index].append(hidden if index and bool(hidden.any()) else None)
            if index + 1 == len(blocks):
                raise _Reached
            return torch.zeros_like(hidden)

        return record

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(_replaced_forward(block, recorder(index)))
        for batch in batches:
            with contextlib.suppress(_Reached):
                model(**batch, use_cache=False)
    return calls


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # An attribute of the instance, where accelerate puts its own too: that one has to come back.
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


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


@contextmanager
def watch_outputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``see(name, y)`` gets what every call of the named modules returns."""
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: see(name, out)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
