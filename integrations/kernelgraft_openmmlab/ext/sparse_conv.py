"""Sparse convolution and pooling in mmcv's terms: lists of pairs of an input and an output row, tap by tap.

Our kernels take a table of neighbours instead. It is kept beside the pairs that it was made with, so that layers which
hand the pairs on find it again; pairs of another origin are turned into a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse import ConvGeometry, sparse_conv
from kernelgraft_core.sparse.conv.ops import sparse_conv_gradients
from kernelgraft_core.sparse.maps.exchanged import exchanged
from kernelgraft_openmmlab.sites import indices_of, map_of, sites_of

__all__ = (
    "fused_indice_conv_forward",
    "get_indice_pairs_2d_backward",
    "get_indice_pairs_2d_forward",
    "get_indice_pairs_3d_backward",
    "get_indice_pairs_3d_forward",
    "get_indice_pairs_4d_forward",
    "indice_conv_backward",
    "indice_conv_forward",
    "indice_maxpool_backward",
    "indice_maxpool_forward",
)

# By the pairs: the table int32 (N_out, K) of input rows, and whether it is symmetric.
_tables: Derived[tuple[Tensor, bool]] = Derived()


def _get_indice_pairs(
    indices: Tensor,
    batch_size: int,
    out_shape: Sequence[int],
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_padding: Sequence[int],
    subm: int,
    transpose: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output rows int32 ``(M, 1 + D)``, pairs int32 ``(K, 2, N)`` filled up with -1, and how many each tap has."""
    sites = sites_of(indices, spatial_shape, batch_size)
    kernel, shape = tuple(map(int, kernel_size)), tuple(map(int, out_shape))
    if subm:  # mmcv centres the kernel at its half, whatever the dilation
        half = tuple(size // 2 for size in kernel)
        geometry = ConvGeometry(kernel, (1,) * len(kernel), half, tuple(map(int, dilation)), submanifold=True)
    else:
        steps, around, apart = (tuple(map(int, each)) for each in (stride, padding, dilation))
        geometry = ConvGeometry(kernel, steps, around, apart)
    known = map_of(geometry, sites, bool(transpose), shape if transpose else None)
    inputs, outputs, starts = known.pairs
    counts = starts.diff()
    pairs = indices.new_full((geometry.volume, 2, len(sites)), -1, dtype=torch.int32)
    place = torch.arange(len(inputs), device=pairs.device) - starts[:-1].repeat_interleave(counts)
    tap = torch.arange(geometry.volume, device=pairs.device).repeat_interleave(counts)
    pairs[tap, 0, place] = inputs
    pairs[tap, 1, place] = outputs
    _tables.of((pairs,), lambda: (known.neighbors, known.symmetric))
    return indices if subm else indices_of(known.outputs), pairs, counts.to(torch.int32)


get_indice_pairs_2d_forward = get_indice_pairs_3d_forward = get_indice_pairs_4d_forward = _get_indice_pairs


def _get_indice_pairs_with_grid(indices: Tensor, grid: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """``grid`` is memory that mmcv lends to its own algorithm."""
    return _get_indice_pairs(indices, *arguments)  # type: ignore[arg-type]


# Named backward in mmcv, though it is the same function with a grid.
get_indice_pairs_2d_backward = get_indice_pairs_3d_backward = _get_indice_pairs_with_grid


def _table(pairs: Tensor, counts: Tensor, inputs: int, outputs: int, inverse: bool) -> tuple[Tensor, bool]:
    """The table of a layer with that many input and output rows, and whether it is symmetric."""
    if inverse:
        forward, _ = _table(pairs, counts, outputs, inputs, inverse=False)
        return exchanged(forward, outputs), False
    return _tables.of((pairs,), lambda: (_table_of(pairs, counts, outputs), False))


def _table_of(pairs: Tensor, counts: Tensor, outputs: int) -> Tensor:
    found = pairs.new_full((outputs, len(pairs)), -1)
    tap, inputs, rows = _listed(pairs, counts)
    found[rows.long(), tap] = inputs
    return found


def fused_indice_conv_forward(
    features: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    pairs: Tensor,
    counts: Tensor,
    outputs: int,
    inverse: int,
    subm: int,
) -> Tensor:
    """``(M, C_out)`` of features ``(N, C_in)`` and filters ``(*kernel, C_in, C_out)``."""
    neighbors, symmetric = _table(pairs, counts, len(features), int(outputs), bool(inverse))
    return sparse_conv(features, _weight(filters, len(pairs)), bias, neighbors, symmetric)


def indice_conv_forward(
    features: Tensor, filters: Tensor, pairs: Tensor, counts: Tensor, outputs: int, inverse: int, subm: int
) -> Tensor:
    return fused_indice_conv_forward(features, filters, None, pairs, counts, outputs, inverse, subm)


def indice_conv_backward(
    features: Tensor, filters: Tensor, grad: Tensor, pairs: Tensor, counts: Tensor, inverse: int, subm: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the features and of the filters."""
    neighbors, symmetric = _table(pairs, counts, len(features), len(grad), bool(inverse))
    weight = _weight(filters, len(pairs))
    grad_features, grad_weight = sparse_conv_gradients(features, weight, grad.contiguous(), neighbors, symmetric)
    grad_filters = torch.zeros_like(filters, memory_format=torch.contiguous_format)
    grad_filters.view(-1, *grad_weight.shape[1:])[: len(grad_weight)] = grad_weight
    return grad_features, grad_filters


def _weight(filters: Tensor, taps: int) -> Tensor:
    """The filters of the first ``taps`` taps, ``(taps, 1, C_in, C_out)``.

    Layers of one ``indice_key`` share pairs in mmcv even where their kernels differ, as in Cylinder3D: a layer of 27
    taps that finds pairs of 9 uses its first 9. Published weights were trained so.
    """
    if taps > filters.shape[:-2].numel():
        raise ValueError(f"filters {tuple(filters.shape)} have fewer taps than the {taps} of the pairs they are given")
    return filters.reshape(-1, 1, *filters.shape[-2:])[:taps]


def indice_maxpool_forward(features: Tensor, pairs: Tensor, counts: Tensor, outputs: int) -> Tensor:
    """The largest feature that an output reads, but at least 0, which compiled mmcv begins with."""
    found = features.new_zeros(int(outputs), features.shape[1])
    inputs, rows = _rows(pairs, counts)
    return found.scatter_reduce_(0, rows.unsqueeze(1).expand(-1, features.shape[1]), features[inputs], "amax")


def indice_maxpool_backward(features: Tensor, out: Tensor, grad: Tensor, pairs: Tensor, counts: Tensor) -> Tensor:
    """Every input that equals the largest gets the gradient, as from compiled mmcv."""
    inputs, rows = _rows(pairs, counts)
    given = torch.where(features[inputs] == out[rows], grad[rows], 0)
    return torch.zeros_like(features).index_add_(0, inputs, given)


def _rows(pairs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    _, inputs, outputs = _listed(pairs, counts)
    return inputs.long(), outputs.long()


def _listed(pairs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair the tap, the input and the output."""
    counted = torch.arange(pairs.shape[2], device=pairs.device) < counts.to(pairs.device).unsqueeze(1)
    tap, place = counted.nonzero(as_tuple=True)
    return tap, pairs[tap, 0, place], pairs[tap, 1, place]
