"""What an adapter says about a family of decoders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from kernelgraft_core.quant.experts import calibrate_every_expert, find_fused_experts, unfuse_experts
from kernelgraft_core.runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from .attention import Attention


@dataclass(frozen=True)
class Source:
    """The module that produces the activations of a group: its output channels can be divided by scales.

    Attributes:
        module: a norm or a linear layer of the block.
        offset: what the module adds to its stored weight: 1 for Gemma's norms, which multiply by ``1 + weight``.
        rows: spans ``(start, stop)`` of the output channels of a fused linear layer that the group reads, in the order
            in which it reads them; None is all of them.
    """

    module: str
    offset: float = 0.0
    rows: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class ScaleGroup:
    """Linear layers that read the same activations, so that one scale per input channel serves them all.

    Attributes:
        source: where the inverse scales go (:func:`~kernelgraft_core.quant.architectures.folding.fold`). None where
            nothing can take them: such a group is rounded without scales.
        targets: the linear layers whose input channels are multiplied by the scales.
        inspect: the module whose output tells how good the scales are.
        per_token: the inspected module treats every token by itself, so that it can be judged on scattered tokens.
        followers: modules that read the same activations and stay in full precision, such as routers; their input
            channels are multiplied by the scales too.
        producers: linear layers whose output channels make those of the input one by one, through functions of single
            numbers: putting them all in another order puts the input in that order. The gate and up layers of an MLP.
    """

    source: Source | None
    targets: tuple[str, ...]
    inspect: str
    per_token: bool = True
    followers: tuple[str, ...] = ()
    producers: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A family of decoders.

    Attributes:
        name: for messages.
        model_types: ``config.model_type`` of the models it describes.
        blocks: paths at which the ``nn.ModuleList`` of decoder blocks may sit; the first that exists counts.
        groups: the scale groups of one block, in the order in which they may be scaled. Every linear layer of the block
            is a target or a follower of exactly one group. It is called with blocks on the meta device and with experts
            still fused as well.
        unclipped: endings of layer names whose weights are not clipped: clipping queries and keys harms the softmax.
        attention: where the heads of a block are (:mod:`~kernelgraft_core.quant.architectures.attention`); None where
            that is not known, and what works on single heads is refused.
        writers: what writes the residual stream besides the embeddings of tokens and the blocks: patterns (as of
            ``fnmatch``) of the names of linear layers, embeddings and bare parameters. A pattern may match nothing.
        towers: for a model with a language tower of its own type, ``config.text_config.model_type`` of those it
            describes; empty for any.

    A family that needs more than names overrides ``prepare``, ``check`` or ``calibrating``.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    groups: Callable[[nn.Module], tuple[ScaleGroup, ...]]
    unclipped: tuple[str, ...] = ("q_proj", "k_proj")
    towers: tuple[str, ...] = ()
    attention: Callable[[nn.Module], Attention] | None = None
    writers: tuple[str, ...] = ()

    def block_path(self, model: nn.Module) -> str:
        """Name of the list of decoder blocks.

        Raises:
            UnsupportedModelError: none of the known paths leads to one; the message says what is there.
        """
        found = []
        for path in self.blocks:
            try:
                module = model.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(module, nn.ModuleList):
                return path
            found.append(f"{path} is {type(module).__name__}")
        detail = "; ".join(found) or f"there is no {' or '.join(self.blocks)}"
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder blocks: {detail}")

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks."""
        blocks = model.get_submodule(self.block_path(model))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def scale_groups(self, block: nn.Module) -> tuple[ScaleGroup, ...]:
        """The groups of one block, in the order in which they may be scaled."""
        return self.groups(block)

    def prepare(self, block: nn.Module) -> None:
        """Make every layer that is to be quantized an ``nn.Linear``, in place: experts are taken apart.

        Raises:
            UnsupportedModelError: the experts are stored in a layout that is not known.
        """
        unfuse_experts(block)

    def calibrating(self, block: nn.Module) -> AbstractContextManager[None]:
        """While open, every expert of a prepared block sees every token; the block's output stays the routed one."""
        return calibrate_every_expert(block)

    def check(self, model: nn.Module) -> None:
        """Refuse a model of the family that differs from what the adapter describes; weights are not looked at.

        Raises:
            UnsupportedModelError: the language tower is of another type, there are no blocks, a layer is missing, is of
                another type or is not known, or experts are stored in another layout. The message names it.
        """
        text = getattr(getattr(model, "config", None), "text_config", None)
        tower = getattr(text, "model_type", None)
        if self.towers and tower not in self.towers:
            raise UnsupportedModelError(
                f"the language tower of this {self.name} model is of type {tower!r}; known: {', '.join(self.towers)}"
            )
        path, blocks = self.block_path(model), self.block_list(model)
        if not len(blocks):
            raise UnsupportedModelError(f"{path} of {type(model).__name__} is empty")
        for index, block in enumerate(blocks):
            try:
                self._check_block(block)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{path}.{index}: {error}") from None

    def _check_block(self, block: nn.Module) -> None:
        fused = tuple(f"{name}." for name, _ in find_fused_experts(block))
        groups = self.scale_groups(block)
        targets = {name for group in groups for name in group.targets}
        for name in sorted(targets):
            if not name.startswith(fused):
                linear_layer(block, name)
        known = targets.union(*(group.followers for group in groups))
        linear = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        strange = [name for name in linear if name not in known]
        if strange:
            raise UnsupportedModelError(f"the {self.name} adapter does not know the linear layers {', '.join(strange)}")


def linear_layer(block: nn.Module, name: str) -> nn.Linear:
    """A linear layer of a block by name.

    Raises:
        UnsupportedModelError: there is none, or it is of another type (a layer that is quantized already, say).
    """
    try:
        layer = block.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(f"{type(block).__name__} has no layer {name}") from None
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{name} of {type(block).__name__} is {type(layer).__name__}, expected Linear")
    return layer
