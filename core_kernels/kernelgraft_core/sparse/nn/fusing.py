"""Norms and activations folded into the convolutions before them, for inference."""

from __future__ import annotations

import collections
from typing import TypeVar

import torch
from torch import nn

from .conv import SparseConvolution
from .pointwise import BatchNorm, ReLU, SyncBatchNorm

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Fold every :class:`BatchNorm` and :class:`ReLU` that follows a convolution in an ``nn.Sequential`` into it.

    Layers that stand in several places stay as they are.

    The model is changed, and returned; it computes the same with fewer passes over its features and less memory. Names
    in its state dict change with it: load a checkpoint first.

    Raises:
        ValueError: the model is in training mode, where norms take their statistics from what they see.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    sequences = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    places = collections.Counter(id(layer) for sequence in sequences for layer in sequence)
    for sequence in sequences:
        layers: list[nn.Module] = []
        for layer in sequence:
            before = layers[-1] if layers else None
            alone = places[id(before)] == 1  # else others want it as it is
            if isinstance(before, SparseConvolution) and alone and before.activation == "none":
                if isinstance(layer, BatchNorm | SyncBatchNorm) and layer.running_mean is not None:
                    _fold(before, layer)
                    continue
                if isinstance(layer, ReLU):
                    before.activation = "relu"
                    continue
            layers.append(layer)
        if len(layers) < len(sequence):
            del sequence[:]
            sequence.extend(layers)
    return model


@torch.no_grad()
def _fold(conv: SparseConvolution, norm: BatchNorm | SyncBatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    shift = shift * scale
    if norm.affine:
        shift = shift + norm.bias.double()
    weight = conv.weight
    factors = scale.view(1, weight.shape[1], 1, weight.shape[3])
    conv.weight = nn.Parameter((weight.double() * factors).to(weight.dtype), requires_grad=weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
