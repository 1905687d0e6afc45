"""Relational graph convolution (R-GCN, arXiv 1703.06103): a matrix for every kind of edge, on :func:`pair_gemm`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.derived import Derived

from .grids import starts_of
from .pair_gemm.ops import pair_gemm

Edges = tuple[Tensor, Tensor, Tensor, Tensor | None]
AGGREGATIONS = ("mean", "sum")


def relational_edges(
    edge_index: Tensor, edge_type: Tensor, relations: int, rows: int, aggregation: str = "mean"
) -> Edges:
    """Edges in the order that :func:`pair_gemm` takes: sources, targets, where each relation begins, and factors.

    Args:
        edge_index: int64 ``(2, E)`` of sources and targets; edge_type: int64 ``(E,)`` below ``relations``.
        rows: number of targets.
        aggregation: ``"mean"`` over the edges of each relation that end in a node, or ``"sum"``.

    Raises:
        ValueError: a shape, a dtype, a type of edge or the aggregation is wrong.
    """
    if edge_index.dtype != torch.int64 or edge_index.dim() != 2 or len(edge_index) != 2:
        raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, expected torch.int64 (2, E)")
    if edge_type.dtype != torch.int64 or edge_type.shape != edge_index.shape[1:]:
        raise ValueError(
            f"edge_type is {edge_type.dtype} {tuple(edge_type.shape)}, expected torch.int64 ({edge_index.shape[1]},)"
        )
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}, expected one of {AGGREGATIONS}")
    if len(edge_type) and not 0 <= int(edge_type.min()) <= int(edge_type.max()) < relations:
        raise ValueError(
            f"edge_type goes from {int(edge_type.min())} to {int(edge_type.max())}, expected 0 to {relations - 1}"
        )
    types, order = edge_type.sort(stable=True)
    sources, targets = edge_index[:, order]
    counts = torch.bincount(types, minlength=relations)
    starts = starts_of(counts)
    scale = None
    if aggregation == "mean":
        _, which, alike = (types * rows + targets).unique(return_inverse=True, return_counts=True)
        scale = 1 / alike[which].float()
    return sources.contiguous(), targets.contiguous(), starts, scale


_known: Derived[dict[tuple[object, ...], Edges]] = Derived()


class RelationalConv(nn.Module):
    """``y_i = x_i W_root + b + sum_r mean_{j in N_r(i)} x_j W_r``; parameters are those of PyG's ``RGCNConv``.

    Args:
        in_channels, out_channels: C_in and C_out.
        relations: kinds of edges.
        bases: make the matrices of relations of this many by linear combination.
        blocks: matrices are of this many blocks along the diagonal; not together with ``bases``.
        aggregation: ``"mean"`` or ``"sum"``, see :func:`relational_edges`.
        root_weight, bias: whether there are those.

    Raises:
        ValueError: ``bases`` and ``blocks`` are both given, or blocks do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        relations: int,
        bases: int | None = None,
        blocks: int | None = None,
        aggregation: str = "mean",
        root_weight: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if bases is not None and blocks is not None:
            raise ValueError(f"bases is {bases} and blocks is {blocks}, expected at most one of them")
        for name, value in (("relations", relations), ("bases", bases), ("blocks", blocks)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if blocks is not None and (in_channels % blocks or out_channels % blocks):
            raise ValueError(f"blocks is {blocks}, which does not divide {in_channels} and {out_channels} channels")
        self.in_channels, self.out_channels, self.relations = in_channels, out_channels, relations
        self.aggregation = aggregation
        shape: tuple[int, ...] = (bases or relations, in_channels, out_channels)
        if blocks is not None:
            shape = relations, blocks, in_channels // blocks, out_channels // blocks
        self.weight = nn.Parameter(torch.empty(shape))
        self.comp = nn.Parameter(torch.empty(relations, bases)) if bases else None
        self.root = nn.Parameter(torch.empty(in_channels, out_channels)) if root_weight else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, as Glorot and Bengio have it."""
        for parameter in (self.weight, self.comp, self.root):
            if parameter is not None:
                bound = math.sqrt(6 / (parameter.shape[-2] + parameter.shape[-1]))
                nn.init.uniform_(parameter, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        """``(N, C_out)`` of ``x (N, C_in)``; edges as for :func:`relational_edges`, whose order is kept with them."""
        known = _known.of((edge_index, edge_type), dict)
        key = self.relations, len(x), self.aggregation
        if key not in known:
            known[key] = relational_edges(edge_index, edge_type, self.relations, len(x), self.aggregation)
        sources, targets, starts, scale = known[key]
        weight = self.weight if self.comp is None else torch.einsum("rb,bio->rio", self.comp, self.weight)
        out = pair_gemm(x, weight, sources, targets, starts, len(x), scale)
        if self.root is not None:
            out = out + x @ self.root
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, relations={self.relations}"
