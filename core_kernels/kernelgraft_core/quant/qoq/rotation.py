"""Block input rotation: the residual stream turned by a Hadamard matrix, which spreads outliers over all channels.

Section 4.2 of QServe (arXiv 2405.04532), after QuaRot. A turn commutes with RMSNorm once the norm's own weight has
moved into the layers that read it. Everything that writes the stream is turned one way, what reads it the other:
nothing changes until weights or activations are rounded, and nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, ScaleGroup, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention
from kernelgraft_core.quant.architectures.folding import weight_of
from kernelgraft_core.quant.outcome import TensorChange
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .hadamard import hadamard


def check_rotation(architecture: Architecture, model: Any) -> None:
    """Refuse a model whose stream cannot be turned.

    Raises:
        UnsupportedModelError: with what is in the way; the message says that rotation can be switched off.
    """
    reason = _obstacle(architecture, model)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be rotated: {reason}. QoQ without rotation: settings rotate=False"
        )


def _obstacle(architecture: Architecture, model: Any) -> str | None:
    width = _width(model)
    try:
        hadamard(width)
    except ValueError as error:
        return str(error)
    if getattr(model.config, "vision_config", None) is not None:
        return "pictures enter its residual stream as they are"
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or (type(module).__name__.endswith("LayerNorm")):
            return "it has LayerNorms, which subtract the mean of the stream; RMSNorms are needed"
    for index, block in enumerate(architecture.block_list(model)):
        readers = {group.source.module for group in _readers(architecture, block) if group.source is not None}
        norms = {name for name, m in block.named_modules() if _is_norm(m) and len(weight_of(m)) == width}
        if other := sorted(norms - readers):
            return f"{other[0]} of block {index} is a norm behind a layer that writes the stream"
        if not readers:
            return f"block {index} has no norms in front of its layers"
    _final_norm(architecture, model)
    return None


def around_blocks(architecture: Architecture, model: Any) -> Mapping[str, TensorChange]:
    """What becomes of the embeddings, the last norm and the output head, by the names of their tensors.

    The model is not changed. The last norm must be in memory. A head that shares the embeddings' tensor gets one of its
    own, under the name ``"<head>.weight"``, made from the embeddings' original.
    """
    turn = hadamard(_width(model))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    norm_name, norm = _final_norm(architecture, model)
    offset = norm_offset(architecture, model)
    gain = weight_of(norm).double() + offset
    return {
        f"{names[embeddings]}.weight": lambda w: _turned(w, turn),
        f"{norm_name}.weight": lambda w: torch.full_like(w, 1 - offset),
        f"{names[head]}.weight": lambda w: _turned(w.double() * gain.to(w.device), turn).to(w.dtype),
    }


@torch.no_grad()
def rotate_block(architecture: Architecture, block: nn.Module, attention: Attention | None) -> None:
    """Turn what a block reads and writes, in place, and the heads between values and attention output."""
    readers = _readers(architecture, block)
    read = [name for group in readers for name in (*group.targets, *group.followers)]
    turn = hadamard(weight_of(block.get_submodule(read[0])).shape[-1])
    for group in readers:
        assert group.source is not None
        norm = weight_of(block.get_submodule(group.source.module))
        gain = norm.double() + group.source.offset
        for name in (*group.targets, *group.followers):
            weight = weight_of(block.get_submodule(name))
            weight.copy_(_turned(weight.double() * gain, turn))
        norm.fill_(1 - group.source.offset)
    for group in architecture.scale_groups(block):
        if group not in readers:
            for name in group.targets:
                _turn_output(linear_layer(block, name), turn)
    if attention is not None:
        _rotate_heads(block, attention)


def _rotate_heads(block: nn.Module, attention: Attention) -> None:
    size = attention.head_size
    try:
        turn = hadamard(size)
    except ValueError:
        return  # heads of such a size stay as they are
    values, output = linear_layer(block, attention.v.module), linear_layer(block, attention.output)
    rows = attention.v.index(values.weight.device)
    heads = values.weight[rows].double().view(-1, size, values.in_features)
    values.weight[rows] = (turn.T.to(heads.device) @ heads).view(len(rows), -1).to(values.weight.dtype)
    if values.bias is not None:
        bias = values.bias[rows].double().view(-1, size)
        values.bias[rows] = (bias @ turn.to(bias.device)).flatten().to(values.bias.dtype)
    columns = output.weight.double().view(output.out_features, -1, size)
    output.weight.copy_((columns @ turn.to(columns.device)).flatten(1))


def _turned(weight: Tensor, turn: Tensor) -> Tensor:
    """``W Q``, computed in float64."""
    return (weight.double() @ turn.to(weight.device)).to(weight.dtype)


def _turn_output(layer: nn.Linear, turn: Tensor) -> None:
    turn = turn.to(layer.weight.device)
    layer.weight.copy_(turn.T @ layer.weight.double())
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() @ turn)


def _readers(architecture: Architecture, block: nn.Module) -> list[ScaleGroup]:
    """The groups whose source is a norm: they read the residual stream."""
    return [
        group
        for group in architecture.scale_groups(block)
        if group.source is not None and _is_norm(block.get_submodule(group.source.module))
    ]


def norm_offset(architecture: Architecture, model: Any) -> float:
    """What the model's norms add to their weight."""
    block = architecture.block_list(model)[0]
    return next(group.source.offset for group in _readers(architecture, block) if group.source is not None)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _final_norm(architecture: Architecture, model: Any) -> tuple[str, nn.Module]:
    parent = architecture.block_path(model).rpartition(".")[0]
    found = [(name, child) for name, child in model.get_submodule(parent).named_children() if _is_norm(child)]
    if len(found) != 1:
        raise UnsupportedModelError(f"{parent} has {len(found)} norms behind its blocks, expected one")
    name, module = found[0]
    return f"{parent}.{name}" if parent else name, module


def _width(model: Any) -> int:
    width = model.get_input_embeddings().weight.shape[1]
    assert isinstance(width, int)
    return width
