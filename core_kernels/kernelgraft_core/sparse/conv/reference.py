"""The plainest correct sparse convolution: gather, multiply, add, one tap after another. Any device, any float type."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_conv(x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, mirrored: bool) -> Tensor:
    taps, groups, cin, cout = weight.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, weights = x.to(wide).view(-1, groups, cin), weight.to(wide)
    out = x.new_zeros((len(neighbors), groups, cout), dtype=wide)
    for tap in range(taps):
        inputs, outputs = _pairs(neighbors, tap)
        product = torch.einsum("ngi,gio->ngo", rows[inputs], weights[taps - 1 - tap if mirrored else tap])
        out.index_add_(0, outputs, product)
    out = out.flatten(1)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def sparse_conv_wgrad(x: Tensor, grad: Tensor, neighbors: Tensor, groups: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, grads = x.to(wide).unflatten(1, (groups, -1)), grad.to(wide).unflatten(1, (groups, -1))
    found = []
    for tap in range(neighbors.shape[1]):
        inputs, outputs = _pairs(neighbors, tap)
        found.append(torch.einsum("ngi,ngo->gio", rows[inputs], grads[outputs]))
    return torch.stack(found).to(x.dtype)


def _pairs(neighbors: Tensor, tap: int) -> tuple[Tensor, Tensor]:
    column = neighbors[:, tap]
    outputs = (column >= 0).nonzero().squeeze(1)
    return column[outputs].long(), outputs
