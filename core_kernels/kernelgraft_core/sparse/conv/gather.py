"""Gather, multiply, scatter: one library product for every tap, on any device.

The dataflow of old, and still the fastest where there are many channels and few rows of a tap are missing: the library
knows the processor best. On a GPU taps of about as many pairs are multiplied together, filled up to the longest.
Products are rounded to the type of the features before they are added up in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived

from .dataflow import ConvConfig

FILLED = 0.25  # more rows, relative to those there are, that filling up a batch of taps may cost on a GPU


@dataclass(frozen=True)
class Taps:
    """Input and output rows int64 of every tap, and which taps are multiplied together, each with its number."""

    rows: list[tuple[Tensor, Tensor]]
    batches: list[list[int]]


_taps: Derived[Taps] = Derived()


def sparse_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, symmetric: bool, activation: str, dataflow: str
) -> Tensor:
    taps = _taps.of((neighbors,), lambda: _split(neighbors))
    out = _products(x, weight, taps, len(neighbors), backwards=False)
    if bias is not None:
        out += bias.to(out.dtype)
    if activation == "relu":
        out.relu_()
    return out.to(x.dtype)


def sparse_conv_dgrad(
    grad: Tensor, weight: Tensor, neighbors: Tensor, rows: int, symmetric: bool, dataflow: str
) -> Tensor:
    taps = _taps.of((neighbors,), lambda: _split(neighbors))
    return _products(grad, weight.transpose(2, 3), taps, rows, backwards=True).to(grad.dtype)


def sparse_conv_wgrad(x: Tensor, grad: Tensor, neighbors: Tensor, groups: int, dataflow: str) -> Tensor:
    taps = _taps.of((neighbors,), lambda: _split(neighbors))
    cin, cout = x.shape[1] // groups, grad.shape[1] // groups
    found = x.new_zeros((neighbors.shape[1], groups, cin, cout))
    for each, (inputs, outputs) in zip(found, taps.rows, strict=True):
        if len(inputs):
            left, right = x[inputs].view(-1, groups, cin), grad[outputs].view(-1, groups, cout)
            torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1), out=each)
    return found


def _products(x: Tensor, weight: Tensor, taps: Taps, rows: int, backwards: bool) -> Tensor:
    """``(rows, C_out)`` in float32 at least; ``backwards``: outputs of the map are read, inputs written."""
    _, groups, cin, cout = weight.shape
    out = x.new_zeros((rows, groups * cout), dtype=torch.promote_types(x.dtype, torch.float32))
    for batch in taps.batches:
        pairs = [taps.rows[tap][::-1] if backwards else taps.rows[tap] for tap in batch]
        longest = max(len(read) for read, _ in pairs)
        if not longest:
            continue
        if len(batch) == 1:
            gathered = x[pairs[0][0]].unsqueeze(0)
        else:
            gathered = x.new_zeros((len(batch), longest, groups * cin))
            for each, (read, _) in zip(gathered, pairs, strict=True):
                torch.index_select(x, 0, read, out=each[: len(read)])
        left = gathered.unflatten(2, (groups, cin)).transpose(1, 2)  # (taps, groups, rows, cin)
        found = torch.matmul(left, weight[batch]).transpose(1, 2).flatten(2)
        for each, (_, written) in zip(found, pairs, strict=True):
            # No two pairs of a tap have one output: the order in which they are added does not matter.
            out.index_add_(0, written, each[: len(written)].to(out.dtype))
    return out


def _split(neighbors: Tensor, filled: float | None = None) -> Taps:
    """``filled``: see :func:`batches`; by default nothing is filled up on a CPU."""
    rows = []
    for column in neighbors.T:
        outputs = (column >= 0).nonzero().squeeze(1)
        rows.append((column[outputs].long(), outputs))
    counts = [len(outputs) for _, outputs in rows]
    if filled is None:
        filled = FILLED if neighbors.device.type == "cuda" else 0.0
    return Taps(rows, batches(counts, filled))


def batches(counts: list[int], filled: float) -> list[list[int]]:
    """Taps by number of pairs, in lists that cost at most ``filled`` more rows when all of a list are as long as the
    longest.
    """
    found: list[list[int]] = []
    for tap in sorted(range(len(counts)), key=lambda tap: -counts[tap]):
        if filled and found:
            longest, there = counts[found[-1][0]], sum(counts[each] for each in found[-1]) + counts[tap]
            if longest * (len(found[-1]) + 1) <= (1 + filled) * there:
                found[-1].append(tap)
                continue
        found.append([tap])
    return found


def supports_sparse_conv(*args: object) -> str | None:
    # What a gradient is told, one dataflow, reads as that of all three directions.
    chosen = ConvConfig.parse(str(args[-1])).forward
    return None if chosen.kind in ("auto", "gather_scatter") else f"dataflow is {chosen}"


supports_sparse_conv_dgrad = supports_sparse_conv_wgrad = supports_sparse_conv
