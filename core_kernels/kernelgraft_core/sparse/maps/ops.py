"""Public ops of kernel maps: which input row each output row reads by each tap."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference


def _fake_sort(sites: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    # No rows of an order where sites are in order already: only the data tell.
    rows = torch.library.get_ctx().new_dynamic_size()
    return sites.new_empty((sites.shape[0],), dtype=torch.int64), sites.new_empty((rows,), dtype=torch.int64)


NEIGHBORS = Op(
    "sparse_neighbors(Tensor in_keys, Tensor? in_order, Tensor out_keys, Tensor? out_order, int[] lines, int taps,"
    " int apart) -> Tensor",
    fake=lambda in_keys, in_order, out_keys, out_order, lines, taps, apart: out_keys.new_empty(
        (out_keys.shape[0], len(lines) * taps), dtype=torch.int32
    ),
)
TRANSPOSE = Op(
    "sparse_transpose(Tensor neighbors, SymInt rows) -> Tensor",
    fake=lambda neighbors, rows: neighbors.new_empty((rows, neighbors.shape[1])),
)
SORT = Op("sparse_sort(Tensor sites, int[] steps) -> (Tensor, Tensor)", fake=_fake_sort)
KEYS = Op(
    "sparse_keys(Tensor sites, Tensor? order, int[] steps, int offset) -> Tensor",
    fake=lambda sites, order, steps, offset: sites.new_empty((sites.shape[0],), dtype=torch.int64),
)
for _op in (NEIGHBORS, TRANSPOSE, SORT, KEYS):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _cpu = (deferred("kernelgraft_core.sparse.maps.cpu", name) for name in (_op.name, f"supports_{_op.name}"))
    _op.register(Implementation("cpu", next(_cpu), ("cpu",), 10, next(_cpu)))
for _op in (NEIGHBORS, TRANSPOSE):  # torch's own sort and arithmetic are as good there
    _gpu = (deferred("kernelgraft_core.sparse.maps.triton", name) for name in (_op.name, f"supports_{_op.name}"))
    _op.register(Implementation("triton", next(_gpu), ("cuda",), 10, next(_gpu)))


def sparse_sort(sites: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Sites in the order of their numbers.

    Args:
        sites: int32 ``(N, 1 + D)``, none negative.
        steps: how much a coordinate of each axis counts.

    Returns:
        int64 ``(N,)``, ascending, and the row of each, int64 ``(N,)``; None where rows are in that order already and no
        number comes twice.

    Raises:
        ValueError: the shape or dtype is wrong.
    """
    _check_sites(sites, steps)
    keys, order = SORT(sites, list(steps))
    return keys, order if len(order) else None


def sparse_keys(sites: Tensor, order: Tensor | None, steps: tuple[int, ...], offset: int = 0) -> Tensor:
    """The numbers of sites, int64 ``(N,)``, plus ``offset``, those of row ``order[i]`` at place ``i``.

    Raises:
        ValueError: the shape or dtype is wrong.
    """
    _check_sites(sites, steps)
    keys: Tensor = KEYS(sites, order, list(steps), offset)
    return keys


def _check_sites(sites: Tensor, steps: tuple[int, ...]) -> None:
    if sites.dtype != torch.int32 or sites.dim() != 2 or sites.shape[1] != len(steps):
        raise ValueError(f"sites is {sites.dtype} {tuple(sites.shape)}, expected torch.int32 (N, {len(steps)})")


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
) -> Tensor:
    """For every output and tap the input that is read, int32 ``(N_out, len(lines) * taps)``, -1 where there is none.

    Output ``o`` reads by tap ``(l, t)`` the input whose key is ``out_keys[o] + lines[l] + t * apart``.

    Args:
        in_keys: int64 ``(N_in,)``, ascending, no two alike; in_order: int64, the row of each, None for their own order.
        out_keys, out_order: the same of the outputs.
        lines: where each line of taps begins; taps: of a line; apart: between the keys of two.

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
    out: Tensor = NEIGHBORS(in_keys, in_order, out_keys, out_order, lines, taps, apart)
    return out
