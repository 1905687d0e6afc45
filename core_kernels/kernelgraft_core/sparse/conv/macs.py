"""How many products a dataflow makes, and how many of them count: what can be known of its speed without a GPU."""

from __future__ import annotations

from torch import Tensor

from .dataflow import Dataflow
from .packing import packed_map


def useful_rows(neighbors: Tensor) -> int:
    """Pairs of rows that have to be multiplied; times ``C_in * C_out / G`` multiply-accumulates."""
    return int((neighbors >= 0).sum())


def executed_rows(neighbors: Tensor, dataflow: Dataflow, rows: int = 128) -> int:
    """Pairs of rows that are multiplied in tiles of ``rows``, those with nothing included.

    Implicit GEMM multiplies a whole tile for every tap that one of its outputs has; the other dataflows fill up the
    last tile of every tap.
    """
    if dataflow.kind in ("implicit_gemm", "auto"):
        return int(packed_map(neighbors, dataflow.splits, rows).starts[-1]) * rows
    counts = (neighbors >= 0).sum(0)
    return int((-(-counts // rows) * rows).sum())


def overhead(neighbors: Tensor, dataflow: Dataflow, rows: int = 128) -> float:
    """Executed over useful; 1 where nothing has to be done."""
    useful = useful_rows(neighbors)
    return executed_rows(neighbors, dataflow, rows) / useful if useful else 1.0
