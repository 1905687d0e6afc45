"""Activation-aware channel reordering: input channels that matter as much share a group.

Section 4.3.2 of QServe (arXiv 2405.04532). Channels are sorted by the largest magnitude of their activations, and the
layers that produce them are sorted the same way, so that nothing has to be moved at run time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Source, linear_layer
from kernelgraft_core.quant.architectures.attention import Attention, Rows


def channel_order(largest: Tensor) -> Tensor:
    """Channels by descending magnitude, int64."""
    return torch.sort(largest, descending=True, stable=True).indices


def head_order(attention: Attention, largest: Tensor) -> Tensor:
    """An order of the attention output's input channels that keeps heads whole, and equal in heads that share values.

    Args:
        largest: ``(heads * head_size,)``.

    Returns:
        ``(kv_heads, head_size)``, an order within each.
    """
    size = attention.head_size
    shared = largest.view(attention.kv_heads, -1, size).amax(1)
    return torch.sort(shared, dim=-1, descending=True, stable=True).indices


@torch.no_grad()
def reorder_heads(block: nn.Module, attention: Attention, order: Tensor) -> None:
    """Sort the channels of each value head, and the columns of the attention output that read them, in place."""
    size, shared = attention.head_size, attention.heads // attention.kv_heads
    starts = torch.arange(attention.kv_heads, device=order.device).unsqueeze(1) * size
    permute_rows(block, attention.v, (order + starts).flatten())
    each = order.repeat_interleave(shared, 0)
    starts = torch.arange(attention.heads, device=order.device).unsqueeze(1) * size
    output = linear_layer(block, attention.output)
    output.weight.data = output.weight.data[:, (each + starts).flatten()].contiguous()


@torch.no_grad()
def reorder_inner(block: nn.Module, producers: Iterable[Source], target: str, order: Tensor) -> None:
    """Sort the input channels of ``target``, and the channels of the ``producers`` that make them, in place."""
    for producer in producers:
        whole = ((0, linear_layer(block, producer.module).out_features),)
        permute_rows(block, Rows(producer.module, producer.rows or whole), order)
    layer = linear_layer(block, target)
    layer.weight.data = layer.weight.data[:, order].contiguous()


@torch.no_grad()
def permute_rows(block: nn.Module, rows: Rows, order: Tensor) -> None:
    """Put output channel ``order[i]`` of ``rows`` in place ``i``, weight and bias."""
    layer = linear_layer(block, rows.module)
    index = rows.index(layer.weight.device)
    layer.weight[index] = layer.weight[index[order]]
    if layer.bias is not None:
        layer.bias[index] = layer.bias[index[order]]
