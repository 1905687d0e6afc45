"""Block input rotation: the residual stream turned by a Hadamard matrix, which spreads outliers over all channels.

Section 4.2 of QServe (arXiv 2405.04532), after QuaRot (arXiv 2404.00456). A turn commutes with RMSNorm once the norm's
own weight has moved into the layers that read it, and with LayerNorm if it leaves the mean of every token as it is.
Everything that writes the stream is turned one way, what reads it the other: nothing changes until weights or
activations are rounded, and nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention
from kernelgraft_core.quant.architectures.folding import weight_of
from kernelgraft_core.quant.outcome import TensorChange
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .turn import Turn


def around_blocks(architecture: Architecture, model: Any) -> Mapping[str, TensorChange]:
    """What becomes of tensors outside the blocks, by name: what writes the stream, the last norm, the output head.

    The model is not changed. The last norm must be in memory, everything else may be on the meta device. A head that
    shares the embeddings' tensor gets one of its own, made from the embeddings' original.

    Raises:
        UnsupportedModelError: the stream of this model cannot be turned. The message says what is in the way, and that
            rotation can be switched off.
    """
    try:
        turn = _turn_of_model(architecture, model)
        return dict(_written(architecture, model, turn)) | _last_norm_and_head(architecture, model, turn)
    except (UnsupportedModelError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be rotated: {error}. QoQ without rotation: settings rotate=False"
        ) from None


@torch.no_grad()
def rotate_block(architecture: Architecture, block: nn.Module) -> None:
    """Turn what a block reads and writes, in place; its norms lose their weights to the layers that read them."""
    readers = _readers(architecture, block)
    turn = _turn_of_block(block, readers)
    for group in readers:
        _turn_readers(block, group, turn)
    for group in architecture.scale_groups(block):
        if group not in readers:
            for name in group.targets:
                layer = linear_layer(block, name)
                layer.weight.copy_(turn.columns(layer.weight))
                if layer.bias is not None:
                    layer.bias.copy_(turn.rows(layer.bias))


@torch.no_grad()
def rotate_heads(block: nn.Module, attention: Attention) -> None:
    """Turn the values of every head, and the columns of the attention output that read them, in place.

    Raises:
        ValueError: there is no Hadamard matrix of the size of a head.
    """
    turn = Turn(attention.head_size)
    values, output = linear_layer(block, attention.v.module), linear_layer(block, attention.output)
    rows = attention.v.index(values.weight.device)
    heads = values.weight[rows].view(-1, turn.width, values.in_features)
    values.weight[rows] = turn.rows(heads.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    if values.bias is not None:
        values.bias[rows] = turn.rows(values.bias[rows].view(-1, turn.width)).flatten()
    output.weight.copy_(turn.rows(output.weight.view(output.out_features, -1, turn.width)).flatten(1))


def _turn_readers(block: nn.Module, group: ScaleGroup, turn: Turn) -> None:
    """The layers behind a norm take over its weight and bias."""
    assert group.source is not None
    norm = block.get_submodule(group.source.module)
    gain, shift = weight_of(norm).double() + group.source.offset, _bias(norm)
    for name in (*group.targets, *group.followers):
        layer = block.get_submodule(name)
        weight, bias = weight_of(layer), _bias(layer)
        if shift is not None:
            assert bias is not None
            bias += weight @ shift
        weight.copy_(turn.rows(weight.double() * gain))
    weight_of(norm).fill_(1 - group.source.offset)
    if shift is not None:
        shift.zero_()


def _turn_of_model(architecture: Architecture, model: Any) -> Turn:
    """The turn that suits all blocks and what is around them; refuses what no turn suits."""
    turns = []
    for index, block in enumerate(architecture.block_list(model)):
        readers = _readers(architecture, block)
        if not readers:
            raise UnsupportedModelError(f"block {index} has no norm with a weight in front of its layers")
        turns.append(_turn_of_block(block, readers))
        _check_norms(architecture, block, readers, index)
    width = model.get_input_embeddings().weight.shape[1]
    if width != turns[0].width:
        raise UnsupportedModelError(f"its embeddings are {width} wide, its residual stream {turns[0].width}")
    return turns[0]


def _turn_of_block(block: nn.Module, readers: list[ScaleGroup]) -> Turn:
    norms = [norm for group in readers if (norm := _norm_in_front(block, group)) is not None]
    return Turn(len(weight_of(norms[0])), centred=_centres(norms))


def _check_norms(architecture: Architecture, block: nn.Module, readers: list[ScaleGroup], index: int) -> None:
    """Refuse norms behind the layers that write the stream, and biases of norms that no layer can take over."""
    attention = architecture.attention(block) if architecture.attention else None
    of_heads = {attention.q_norm, attention.k_norm} if attention is not None else set()
    known = {group.source.module for group in readers if group.source is not None}
    for name, module in block.named_modules():
        if _is_norm(module) and name not in known | of_heads:
            raise UnsupportedModelError(f"{name} of block {index} is a norm behind a layer that writes the stream")
    for group in readers:
        norm = _norm_in_front(block, group)
        if norm is None or _bias(norm) is None:
            continue
        for name in (*group.targets, *group.followers):
            if _bias(block.get_submodule(name)) is None:
                raise UnsupportedModelError(f"{name} of block {index} has no bias to take over that of the norm before")


def _written(architecture: Architecture, model: Any, turn: Turn) -> Iterator[tuple[str, TensorChange]]:
    """The embeddings, and whatever else writes the stream outside the blocks."""
    embeddings = model.get_input_embeddings()
    others = 0
    for name, module in model.named_modules():
        if module is embeddings:
            yield f"{name}.weight", turn.rows
        elif not any(fnmatch(name, pattern) for pattern in architecture.writers):
            continue
        elif isinstance(module, nn.Linear | nn.Embedding):
            others += 1
            yield f"{name}.weight", turn.columns if isinstance(module, nn.Linear) else turn.rows
            if _bias(module) is not None:
                yield f"{name}.bias", turn.rows
        else:
            raise UnsupportedModelError(f"{name}, which writes the residual stream, is {type(module).__name__}")
    for name, _ in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in architecture.writers):
            yield name, turn.rows
    if getattr(model.config, "vision_config", None) is not None and not others:
        raise UnsupportedModelError("the adapter does not say which layers write pictures into its residual stream")


def _last_norm_and_head(architecture: Architecture, model: Any, turn: Turn) -> dict[str, TensorChange]:
    path = architecture.block_path(model).rpartition(".")[0]
    norms = {name: child for name, child in model.get_submodule(path).named_children() if _is_norm(child)}
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if len(norms) != 1 or head is None:
        raise UnsupportedModelError(f"{path} has {len(norms)} norms behind its blocks, and the output head is {head}")
    ((child, norm),) = norms.items()
    name, block = f"{path}.{child}".lstrip("."), architecture.block_list(model)[0]
    sources = [group.source for group in _readers(architecture, block) if group.source is not None]
    _centres([norm, *(block.get_submodule(source.module) for source in sources)])
    offset = sources[0].offset
    gain, bias = weight_of(norm).double() + offset, _bias(norm)
    changes: dict[str, TensorChange] = {
        f"{name}.weight": lambda w: torch.full_like(w, 1 - offset),
        f"{head}.weight": lambda w: turn.rows(w.double() * gain.to(w.device)).to(w.dtype),
    }
    if bias is not None:
        # A head has no bias that could take it over.
        if bool(((gain == 0) & (bias != 0)).any()):
            raise UnsupportedModelError(f"{name} has a bias where its weight is 0")
        changes[f"{name}.bias"] = lambda b: turn.rows(b / torch.where(gain == 0, 1, gain).to(b.device)).to(b.dtype)
    return changes


def _readers(architecture: Architecture, block: nn.Module) -> list[ScaleGroup]:
    """The groups whose layers read the residual stream; those of all others write it."""
    return [group for group in architecture.scale_groups(block) if _norm_in_front(block, group) is not None]


def _norm_in_front(block: nn.Module, group: ScaleGroup) -> nn.Module | None:
    """The norm whose output a group's layers read, if one is what feeds them: then they read the residual stream."""
    if group.source is None or group.producers:
        return None  # layers make their inputs, which do not exist by themselves while experts are fused
    module = block.get_submodule(group.source.module)
    return module if _is_norm(module) else None


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _centres(norms: list[nn.Module]) -> bool:
    """Whether norms subtract the mean."""
    kinds = set()
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm) and "RMSNorm" not in type(norm).__name__:
            raise UnsupportedModelError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm")
        kinds.add(isinstance(norm, nn.LayerNorm))
    if len(kinds) != 1:
        raise UnsupportedModelError("it has LayerNorms and RMSNorms")
    return kinds.pop()


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.data if isinstance(bias, Tensor) else None
