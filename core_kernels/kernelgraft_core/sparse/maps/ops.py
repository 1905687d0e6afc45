"""Public ops of kernel maps: which input row each output row reads by each tap."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

NEIGHBORS = Op(
    "sparse_neighbors(Tensor in_keys, Tensor? in_order, Tensor out_keys, Tensor? out_order, int[] lines, int taps,"
    " int apart, bool mirrored) -> Tensor",
    fake=lambda in_keys, in_order, out_keys, out_order, lines, taps, apart, mirrored: out_keys.new_empty(
        (out_keys.shape[0], len(lines) * taps), dtype=torch.int32
    ),
)
NEIGHBORS.register(Implementation("reference", reference.sparse_neighbors, ("cpu", "cuda")))
NEIGHBORS.register(
    Implementation(
        "cpu",
        deferred("kernelgraft_core.sparse.maps.cpu", "sparse_neighbors"),
        ("cpu",),
        10,
        deferred("kernelgraft_core.sparse.maps.cpu", "supports_sparse_neighbors"),
    )
)

TRANSPOSE = Op(
    "sparse_transpose(Tensor neighbors, SymInt rows) -> Tensor",
    fake=lambda neighbors, rows: neighbors.new_empty((rows, neighbors.shape[1])),
)
TRANSPOSE.register(Implementation("reference", reference.sparse_transpose, ("cpu", "cuda")))
TRANSPOSE.register(
    Implementation(
        "cpu",
        deferred("kernelgraft_core.sparse.maps.cpu", "sparse_transpose"),
        ("cpu",),
        10,
        deferred("kernelgraft_core.sparse.maps.cpu", "supports_sparse_transpose"),
    )
)


def sparse_transpose(neighbors: Tensor, rows: int) -> Tensor:
    """Exchange inputs and outputs of a kernel map.

    Args:
        neighbors: int32 ``(N_out, K)`` input rows, -1 for none; no two outputs read one input by the same tap.
        rows: N_in.

    Returns:
        int32 ``(N_in, K)``: the output that reads each input by each tap, -1 where none does.

    Raises:
        ValueError: the shape or dtype is wrong.
    """
    if neighbors.dtype != torch.int32 or neighbors.dim() != 2:
        raise ValueError(f"neighbors is {neighbors.dtype} {tuple(neighbors.shape)}, expected torch.int32 (N_out, K)")
    out: Tensor = TRANSPOSE(neighbors, rows)
    return out


def sparse_neighbors(
    in_keys: Tensor,
    in_order: Tensor | None,
    out_keys: Tensor,
    out_order: Tensor | None,
    lines: list[int],
    taps: int,
    apart: int,
    mirrored: bool,
) -> Tensor:
    """For every output and tap the input that is read, int32 ``(N_out, len(lines) * taps)``, -1 where there is none.

    Output ``o`` reads by tap ``(l, t)`` the input whose key is ``out_keys[o] + lines[l] + t * apart``.

    Args:
        in_keys: int64 ``(N_in,)``, ascending, no two alike; in_order: int64, the row of each, None for their own order.
        out_keys, out_order: the same of the outputs.
        lines: where each line of taps begins; taps: of a line; apart: between the keys of two.
        mirrored: inputs and outputs are the same, and the taps symmetric: the last is the first one's opposite.

    Raises:
        ValueError: dtypes or sizes do not belong together.
    """
    for name, keys, order in (("in", in_keys, in_order), ("out", out_keys, out_order)):
        if keys.dtype != torch.int64 or keys.dim() != 1:
            raise ValueError(f"{name}_keys is {keys.dtype} {tuple(keys.shape)}, expected torch.int64 (N,)")
        if order is not None and (order.dtype != torch.int64 or order.shape != keys.shape):
            raise ValueError(f"{name}_order is {order.dtype} {tuple(order.shape)}, expected torch.int64 {len(keys)}")
        if keys.shape[0] >= 1 << 31:
            raise ValueError(f"there are {keys.shape[0]} rows, at most 2^31 - 1 are supported")
    if in_keys.device != out_keys.device:
        raise ValueError(f"in_keys is on {in_keys.device}, out_keys on {out_keys.device}")
    if taps < 1 or apart < 1 or not lines:
        raise ValueError(f"there are {len(lines)} lines of {taps} taps, {apart} apart; expected at least 1 of each")
    out: Tensor = NEIGHBORS(in_keys, in_order, out_keys, out_order, lines, taps, apart, mirrored)
    return out
