"""Scales that make keys and the inputs of output layers easier to quantize, folded into weights.

Sections 4.2 and 5 of QServe (arXiv 2405.04532): SmoothAttention divides keys and multiplies queries, so that no channel
of the key cache is much larger than the others; block output smoothing does the same to the inputs of a block's last
layers, as SmoothQuant (arXiv 2211.10438) does. Nothing changes until something is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Source, fold, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention, Rows
from kernelgraft_core.quant.architectures.folding import weight_of

SMALLEST = 1e-5  # magnitudes below count as this


def attention_scales(attention: Attention, largest: Tensor, alpha: float) -> Tensor:
    """What keys are divided by: ``(kv_heads, head_size)``, ``largest ** alpha`` with geometric centre 1 per head.

    Rotary embeddings turn channels ``i`` and ``i + rotary / 2`` into each other: both get one scale. A norm of keys is
    shared by all heads, and so are the scales then.

    Args:
        largest: ``(kv_heads * head_size,)`` largest magnitude of every key channel, behind the norm if there is one.
    """
    by_head = largest.view(attention.kv_heads, attention.head_size).clamp(min=SMALLEST)
    if attention.k_norm is not None:
        by_head = by_head.amax(0, keepdim=True).expand_as(by_head)
    turned = attention.rotary
    pairs = by_head[:, :turned].view(len(by_head), 2, turned // 2).amax(1, keepdim=True).expand(-1, 2, -1)
    return _centred(torch.cat([pairs.flatten(1), by_head[:, turned:]], 1).pow(alpha))


@torch.no_grad()
def smooth_attention(block: nn.Module, attention: Attention, scales: Tensor) -> None:
    """Divide keys by ``scales`` ``(kv_heads, head_size)`` and multiply queries by them, in place."""
    if attention.q_norm is not None and attention.k_norm is not None:
        for name, factor in ((attention.k_norm, 1 / scales[0]), (attention.q_norm, scales[0])):
            weight = weight_of(block.get_submodule(name))
            offset = attention.norm_offset
            weight.copy_((weight + offset) * factor.to(weight.dtype) - offset)
        return
    _scale_rows(block, attention.k, 1 / scales.flatten())
    _scale_rows(block, attention.q, _for_queries(attention, scales))


def value_scales(attention: Attention, largest: Tensor, weight: Tensor, exponents: tuple[float, float]) -> Tensor:
    """What values are divided by, ``(kv_heads, head_size)``: :func:`output_scales`, the largest of heads that share.

    Args:
        largest: ``(heads * head_size,)`` largest magnitude of every input channel of the attention output.
        weight: of the attention output.
    """
    shape = attention.kv_heads, -1, attention.head_size
    shared = largest.view(shape).amax(1).flatten(), weight.abs().amax(0).view(shape).amax(1).flatten()
    return _ratio(*shared, exponents).view(attention.kv_heads, attention.head_size)


@torch.no_grad()
def smooth_values(block: nn.Module, attention: Attention, scales: Tensor) -> None:
    """Divide values by ``scales`` ``(kv_heads, head_size)``, and make up for it in the attention output, in place."""
    _scale_rows(block, attention.v, 1 / scales.flatten())
    linear_layer(block, attention.output).weight.mul_(_for_queries(attention, scales))


def output_scales(largest: Tensor, weight: Tensor, exponents: tuple[float, float]) -> Tensor:
    """``(K,)``: what the inputs of a layer are divided by, ``|x| ** alpha / |W| ** beta`` by largest magnitudes."""
    return _ratio(largest, weight.abs().amax(0), exponents)


@torch.no_grad()
def smooth_output(block: nn.Module, source: Source, target: str, scales: Tensor) -> None:
    """Divide what ``source`` gives by ``scales`` and multiply the input channels of ``target`` by them, in place."""
    fold(block, source, (), scales)
    linear_layer(block, target).weight.mul_(scales)


def _for_queries(attention: Attention, scales: Tensor) -> Tensor:
    """Scales of heads of keys and values as those of the queries' heads that read them, flat."""
    return scales.repeat_interleave(attention.heads // attention.kv_heads, 0).flatten()


def _ratio(inputs: Tensor, weights: Tensor, exponents: tuple[float, float]) -> Tensor:
    alpha, beta = exponents
    return _centred(inputs.clamp(min=SMALLEST).pow(alpha) / weights.clamp(min=SMALLEST).pow(beta))


def _centred(scales: Tensor) -> Tensor:
    return scales / scales.log().mean(-1, keepdim=True).exp()


def _scale_rows(block: nn.Module, rows: Rows, factor: Tensor) -> None:
    layer = linear_layer(block, rows.module)
    index = rows.index(layer.weight.device)
    layer.weight[index] *= factor.to(layer.weight.dtype).unsqueeze(-1)
    if layer.bias is not None:
        layer.bias[index] *= factor.to(layer.bias.dtype)
