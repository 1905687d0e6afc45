"""The plainest correct sparse convolution: gather, multiply, add, one tap after another. Any device, any float type."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbors: Tensor,
    symmetric: bool = False,
    activation: str = "none",
    dataflow: str = "auto",
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, weights = x.to(wide).unflatten(1, weight.shape[1:3]), weight.to(wide)
    out = rows.new_zeros((len(neighbors), weight.shape[1], weight.shape[3]))
    for tap, each in enumerate(weights):
        inputs, outputs = _pairs(neighbors, tap)
        out.index_add_(0, outputs, torch.einsum("ngi,gio->ngo", rows[inputs], each))
    flat: Tensor = out.flatten(1)
    if bias is not None:
        flat += bias.to(wide)
    if activation == "relu":
        flat = flat.relu()
    return flat.to(x.dtype)


def sparse_conv_dgrad(
    grad: Tensor, weight: Tensor, neighbors: Tensor, rows: int, symmetric: bool = False, dataflow: str = "auto"
) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    grads, weights = grad.to(wide).unflatten(1, (weight.shape[1], weight.shape[3])), weight.to(wide)
    found = grads.new_zeros((rows, *weight.shape[1:3]))
    for tap, each in enumerate(weights):
        inputs, outputs = _pairs(neighbors, tap)
        found.index_add_(0, inputs, torch.einsum("ngo,gio->ngi", grads[outputs], each))
    flat: Tensor = found.flatten(1)
    return flat.to(grad.dtype)


def sparse_conv_wgrad(x: Tensor, grad: Tensor, neighbors: Tensor, groups: int, dataflow: str = "auto") -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide).unflatten(1, (groups, x.shape[1] // groups))
    grads = grad.to(wide).unflatten(1, (groups, grad.shape[1] // groups))
    found: Tensor = rows.new_zeros((neighbors.shape[1], *rows.shape[1:], grads.shape[2]))
    for tap, each in enumerate(found):
        inputs, outputs = _pairs(neighbors, tap)
        each.copy_(torch.einsum("ngi,ngo->gio", rows[inputs], grads[outputs]))
    return found.to(x.dtype)


def _pairs(neighbors: Tensor, tap: int) -> tuple[Tensor, Tensor]:
    column = neighbors[:, tap]
    outputs = (column >= 0).nonzero().squeeze(1)
    return column[outputs].long(), outputs
