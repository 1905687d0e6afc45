"""Pairs of one relation and one output merged: their inputs are summed before they are multiplied, not after.

Products are linear, so that a relation's matrix is applied once to every output that it reaches. What is left has no
output twice in a relation, which is what the kernels of sparse convolution ask for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """``U`` different pairs of a relation and an output, in the order of ``by``.

    Attributes:
        sums: sparse CSR ``(U, N_in)``: which rows of the input are summed, and with which factors. None where every
            pair is another and has no factor: then pair ``u`` reads row ``inputs[u]``.
        inputs: int64 ``(U,)``, the row that is read: of the sums where there are some.
        relations, outputs: int64 ``(U,)``.
    """

    sums: Tensor | None
    inputs: Tensor
    relations: Tensor
    outputs: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """What is multiplied, float32 ``(U, C_in)`` or ``x`` itself."""
        if self.sums is None:
            return x
        found: Tensor = torch.mm(self.sums, x.float())
        return found


def merge(
    inputs: Tensor, outputs: Tensor, starts: Tensor, scale: Tensor | None, sizes: tuple[int, int], tile_rows: int
) -> Merged:
    """See :class:`Merged`; ordered by tile of ``tile_rows`` outputs, then by relation and output.

    ``sizes``: rows of the input and of the output.
    """
    device, (in_rows, out_rows) = inputs.device, sizes
    taps = len(starts) - 1
    relations = torch.repeat_interleave(torch.arange(taps, device=device), starts.diff(), output_size=len(inputs))
    tile_rows = min(tile_rows, max(1, out_rows))
    keys = ((outputs // tile_rows) * taps + relations) * tile_rows + outputs % tile_rows
    keys, order = keys.sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    sources, relations, outputs = inputs[order], relations[order], outputs[order]
    if scale is None and bool(first.all()):
        return Merged(None, sources, relations, outputs)
    begins = first.nonzero().squeeze(1)
    values = sources.new_ones(len(sources), dtype=torch.float32) if scale is None else scale[order].float()
    bounds = torch.cat((begins, begins.new_tensor([len(sources)])))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sums = torch.sparse_csr_tensor(bounds, sources, values, (len(begins), in_rows), check_invariants=False)
    return Merged(sums, torch.arange(len(begins), device=device), relations[begins], outputs[begins])
