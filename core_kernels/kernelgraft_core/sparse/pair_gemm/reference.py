"""The plainest correct products of pairs of rows, one relation after another, on any device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def pair_gemm(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, rows: int
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    values, weights = x.to(wide).unflatten(1, weight.shape[1:3]), weight.to(wide)
    out = values.new_zeros((rows, weight.shape[1], weight.shape[3]))
    for each, (source, target, factor) in zip(weights, _relations(inputs, outputs, starts, scale), strict=True):
        products = torch.einsum("ngi,gio->ngo", values[source], each)
        out.index_add_(0, target, products if factor is None else products * factor.to(wide).view(-1, 1, 1))
    flat: Tensor = out.flatten(1)
    return flat.to(x.dtype)


def pair_gemm_wgrad(
    x: Tensor, grad: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, groups: int
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    values, grads = (each.to(wide).unflatten(1, (groups, each.shape[1] // groups)) for each in (x, grad))
    found = values.new_zeros((len(starts) - 1, groups, values.shape[2], grads.shape[2]))
    for each, (source, target, factor) in zip(found, _relations(inputs, outputs, starts, scale), strict=True):
        right = grads[target] if factor is None else grads[target] * factor.to(wide).view(-1, 1, 1)
        each.copy_(torch.einsum("ngi,ngo->gio", values[source], right))
    narrow: Tensor = found.to(x.dtype)
    return narrow


def _relations(
    inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    bounds = starts.tolist()
    return [
        (inputs[first:last].long(), outputs[first:last].long(), None if scale is None else scale[first:last])
        for first, last in itertools.pairwise(bounds)
    ]
