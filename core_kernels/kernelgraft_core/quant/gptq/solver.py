"""GPTQ rounding (Frantar et al., arXiv 2210.17323): columns one by one, later ones make up for earlier ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from kernelgraft_core.runtime.errors import NonFiniteError

log = logging.getLogger("kernelgraft")

Order = Literal["activation", "natural"]

# One column of weights (N,) and the number of its group -> integers (N,) and the values (N,) that they stand for.
RoundColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class ColumnGrid(Protocol):
    """Grids ``(N, G)`` to round to, such as :class:`~kernelgraft_core.quant.rounding.Grid`."""

    @property
    def shape(self) -> torch.Size: ...
    def columns(self) -> Sequence[ColumnGrid]: ...
    def round(self, groups: Tensor) -> Tensor: ...
    def values(self, integers: Tensor) -> Tensor: ...


def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    grid: ColumnGrid,
    *,
    block: int = 128,
    damping: float = 0.01,
    order: Order = "activation",
) -> Tensor:
    """Round to a grid such that ``tr((Q - W) H (Q - W)^T)`` stays small.

    Args:
        weight: ``(N, K)`` float32 or float64.
        hessian: ``(K, K)`` second moments ``X^T X`` of the layer's input, any positive multiple of them.
        grid: the grids to round to, of equally many columns each. They are fixed before the first column is rounded, so
            that groups lie side by side whatever the order of columns.
        block, damping, order: as for :func:`round_columns`.

    Returns:
        Integers ``(N, K)`` in the weight's dtype.

    Raises:
        ValueError: shapes disagree, or a number is out of range.
        NonFiniteError: the weight or the Hessian holds NaN or infinity, or no damping made the Hessian definite.
    """
    groups = grid.columns()
    if grid.shape[0] != weight.shape[0] or weight.shape[1] % max(len(groups), 1):
        raise ValueError(f"weight is {tuple(weight.shape)}, but the grid is for {tuple(grid.shape)} groups")

    def to_grid(column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        integers = groups[group].round(column.view(-1, 1, 1))
        return integers.flatten(), groups[group].values(integers).flatten()

    size = weight.shape[1] // max(len(groups), 1)
    return round_columns(weight, hessian, to_grid, group_size=size, block=block, damping=damping, order=order)


def round_columns(
    weight: Tensor,
    hessian: Tensor,
    round_column: RoundColumn,
    *,
    group_size: int,
    block: int = 128,
    damping: float = 0.01,
    order: Order = "activation",
) -> Tensor:
    """GPTQ for any way to round a column; the grids may not depend on the columns that were rounded before.

    Columns whose inputs were never anything but zero count for nothing: they are rounded as they are.

    Args:
        weight, hessian: as for :func:`gptq_round`.
        round_column: rounds one column of a group (:data:`RoundColumn`).
        group_size: columns per group; -1 is one group.
        block: columns after which the rest of the weight hears of the errors; changes the time, not the result.
        damping: added to the Hessian's diagonal as a share of its mean. It is raised, and that is logged, where the
            Hessian is not definite enough to be factored.
        order: ``"activation"`` rounds columns with the largest inputs first, while many others can still make up for
            them; ``"natural"`` from left to right.

    Returns:
        Integers ``(N, K)`` in the weight's dtype.

    Raises:
        ValueError, NonFiniteError: as for :func:`gptq_round`.
    """
    k = weight.shape[-1]
    size = k if group_size == -1 else group_size
    _check(weight, hessian, size, block, damping, order)
    energy = hessian.diagonal()
    columns = torch.argsort(energy, descending=True, stable=True) if order == "activation" else torch.arange(k)
    columns = columns.to(weight.device)
    factor = _inverse_factor(hessian[columns][:, columns], damping).to(weight.dtype)
    # Columns become rows, which lie side by side in memory.
    rest = weight.T[columns]
    integers = torch.empty_like(rest)
    pivots, groups = factor.diagonal().tolist(), (columns // size).tolist()
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            integers[i], values = round_column(rest[i], groups[i])
            torch.sub(rest[i], values, out=errors[i - start]).div_(pivots[i])
            rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return torch.empty_like(integers).index_copy_(0, columns, integers).T.contiguous()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``U^T U = H^-1`` for the damped Hessian, float64.

    Row ``i`` of ``U``, divided by its diagonal, says how the columns after ``i`` make up for a change of column ``i``.
    """
    hessian = hessian.double()
    energy = hessian.diagonal()
    live = energy > 0
    mean = float(energy[live].mean()) if live.any() else 1.0
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    share = damping
    while share <= max(1.0, damping):
        damped = hessian / mean + identity * torch.where(live, share, 1.0)
        # H = R R^T with R upper triangular gives U = R^-1. Cholesky's factor is lower: turn the matrix round, and back.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            if share > damping:
                log.warning("a Hessian of %d columns needed damping %g instead of %g", len(hessian), share, damping)
            # The scale of H cancels out of every correction.
            factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            return factor
        share = max(share * 10, 1e-6)
    raise NonFiniteError(f"the Hessian of {len(hessian)} columns is not positive definite with damping {share / 10:g}")


def _check(weight: Tensor, hessian: Tensor, group_size: int, block: int, damping: float, order: str) -> None:
    k = weight.shape[-1]
    if weight.dim() != 2 or hessian.shape != (k, k):
        raise ValueError(
            f"weight is {tuple(weight.shape)}, the Hessian {tuple(hessian.shape)}; expected (N, K), (K, K)"
        )
    if group_size < 1 or k % group_size:
        raise ValueError(f"group size {group_size} does not divide K = {k}")
    if block < 1:
        raise ValueError(f"block of {block} columns; at least 1 is needed")
    if not 0 <= damping <= 1:
        raise ValueError(f"damping {damping} is not between 0 and 1")
    if order not in get_args(Order):
        raise ValueError(f"order {order!r}; there are {', '.join(get_args(Order))}")
    for name, tensor in (("weight", weight), ("Hessian", hessian)):
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"the {name} is not finite in {bad} of {tensor.numel()} places")
