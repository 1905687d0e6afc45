"""Quantize a decoder block after block; where blocks come from and where activations lie is left to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.errors import NonFiniteError

from .architectures import Architecture, find_architecture, linear_layer
from .outcome import BlockOutcome, Method, TensorChange
from .rounding import split_groups
from .sequential import BlockCalls, capture_block_calls


@dataclass(frozen=True)
class BlockResult:
    """Block number ``index`` of ``count``, quantized."""

    index: int
    count: int
    outcome: BlockOutcome


class Blocks(Protocol):
    """The blocks of a model, of which only those that are open need to be in memory."""

    @property
    def count(self) -> int: ...

    def path(self, index: int) -> str:
        """Name of a block in the model."""
        ...

    def open(self, index: int) -> AbstractContextManager[nn.Module]:
        """A block in floating point, its layers prepared (:meth:`Architecture.prepare`)."""
        ...


class Activations(Protocol):
    """Keeps the hidden states that enter each block for as long as they may be needed."""

    def keep(self, index: int, hidden: Iterable[Tensor]) -> Sequence[Tensor]:
        """Store what enters block ``index``, consumed one at a time, and forget what entered earlier ones."""
        ...


class InMemory:
    """Activations that stay in memory."""

    def keep(self, index: int, hidden: Iterable[Tensor]) -> Sequence[Tensor]:
        return list(hidden)


class ModelBlocks:
    """The blocks of a model that is in memory as a whole, on one device or several."""

    def __init__(self, architecture: Architecture, model: nn.Module) -> None:
        self._architecture = architecture
        self._list = architecture.block_list(model)
        self._path = architecture.block_path(model)

    @property
    def count(self) -> int:
        return len(self._list)

    def path(self, index: int) -> str:
        return f"{self._path}.{index}"

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        yield self._list[index]


@torch.no_grad()
def quantize_model(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], method: Method, *, scheme_group_size: int
) -> Iterator[BlockResult]:
    """Quantize the decoder blocks of ``model`` in place, yielding each as it is done.

    After the last block the model computes in floating point exactly what the packed weights stand for: norms carry the
    folded scales, linear layers the rounded values.

    Args:
        model: a causal language model of a known family (:mod:`kernelgraft_core.quant.architectures`), float32.
        batches: token ids ``(1, T)`` int64, or keyword arguments of the model, on the model's device.
        method: AWQ, GPTQ, ...
        scheme_group_size: of the method, to refuse layers that it does not divide before any work.

    Raises:
        UnsupportedModelError: no adapter knows the model.
        NonFiniteError: weights or activations of a layer hold NaN or infinity; the message names it.
        ValueError: the group size does not divide a layer's K, or there are no batches.
    """
    architecture = find_architecture(model)
    architecture.check(model)
    blocks = ModelBlocks(architecture, model)
    for index, block in enumerate(architecture.block_list(model)):
        architecture.prepare(block)
        check_layers(architecture, block, blocks.path(index), scheme_group_size)
    change_around(model, method.around(architecture, model))
    calls = capture_block_calls(model, list(architecture.block_list(model)), as_arguments(batches))
    if not calls.first:
        raise ValueError("no calibration batches were given")
    yield from quantize_blocks(architecture, blocks, calls, method, InMemory())


def change_around(model: Any, changes: Mapping[str, TensorChange]) -> None:
    """Change tensors of a model that lie outside its blocks, in place; a head that is tied to embeddings is untied."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if changes and head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, getattr(model.config, "text_config", None)):
            if config is not None:
                config.tie_word_embeddings = False
    for name, change in changes.items():
        parameter = model.get_parameter(name)
        parameter.data = change(parameter.data)


def quantize_blocks(
    architecture: Architecture,
    blocks: Blocks,
    calls: BlockCalls,
    method: Method,
    activations: Activations,
    *,
    start: int = 0,
    hidden: Sequence[Tensor] | None = None,
    finished: Callable[[int, nn.Module, BlockOutcome], None] | None = None,
) -> Iterator[BlockResult]:
    """Quantize the blocks from ``start`` on.

    Args:
        calls: how the model calls its blocks.
        activations: takes the hidden states that enter each block.
        start, hidden: where to go on, and what enters that block.
        finished: called with every quantized block before it goes and before the next one's inputs are stored.
    """
    if hidden is None:
        hidden = activations.keep(0, calls.first)
    for index in range(start, blocks.count):
        with blocks.open(index) as block:
            device = next(block.parameters()).device
            entering = hidden if device.type == "cpu" else [h.to(device) for h in hidden]
            inputs = calls.inputs(index, entering, device)
            outcome = method.quantize_block(architecture, block, blocks.path(index), inputs)
            if finished is not None:
                finished(index, block, outcome)
            if index + 1 < blocks.count:
                # The next block is searched on what the quantized ones really produce, so that it can make up for it.
                with method.as_served(architecture, block):
                    hidden = activations.keep(index + 1, calls.entering(index + 1, inputs.outputs(block)))
        yield BlockResult(index, blocks.count, outcome)


def as_arguments(batches: Iterable[Tensor | Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """Batches as keyword arguments of a model; a tensor is its ``input_ids``."""
    for batch in batches:
        yield {"input_ids": batch} if isinstance(batch, Tensor) else batch


def check_layers(architecture: Architecture, block: nn.Module, path: str, group_size: int) -> None:
    """Refuse layers that are not finite or that the group size does not divide.

    Raises:
        NonFiniteError, ValueError: with the name of the first such layer.
    """
    for group in architecture.scale_groups(block):
        for name in group.targets:
            weight = linear_layer(block, name).weight
            try:
                split_groups(weight, group_size)
            except ValueError as error:
                raise ValueError(f"{path}.{name}: {error}") from None
            if not torch.isfinite(weight).all():
                bad = int((~torch.isfinite(weight)).sum())
                raise NonFiniteError(f"weights of {path}.{name} are not finite in {bad} of {weight.numel()} places")
