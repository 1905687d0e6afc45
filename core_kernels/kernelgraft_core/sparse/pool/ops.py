"""Public pooling ops over kernel maps: checked here once, run by the best backend at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op
from kernelgraft_core.sparse.maps.exchanged import exchanged

from . import reference

LARGEST_TAP = 32767


def sparse_sum_pool(x: Tensor, neighbors: Tensor) -> Tensor:
    """Sums of the rows of ``x`` that each output reads; 0 where it reads none.

    Args:
        x: ``(N_in, C)``, floating point; summed in float32 at least.
        neighbors: int32 ``(N_out, K)`` input rows, -1 for none.

    Returns:
        ``(N_out, C)``, dtype of ``x``. Differentiable in ``x``.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    _check(x, neighbors)
    out: Tensor = SUM(x, neighbors)
    return out


def sparse_max_pool(x: Tensor, neighbors: Tensor) -> Tensor:
    """The largest, channel by channel, of the rows of ``x`` that each output reads; 0 where it reads none.

    NaN counts as larger than anything. Of several that are equal the first tap's gets the gradient. Arguments and
    errors as for :func:`sparse_sum_pool`.
    """
    _check(x, neighbors)
    if neighbors.shape[1] > LARGEST_TAP:
        raise ValueError(f"neighbors has {neighbors.shape[1]} taps, at most {LARGEST_TAP} are supported")
    out: Tensor = MAX(x, neighbors)[0]
    return out


def _check(x: Tensor, neighbors: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (N, C)")
    if neighbors.dtype != torch.int32 or neighbors.dim() != 2 or neighbors.device != x.device:
        raise ValueError(
            f"neighbors is {neighbors.dtype} {tuple(neighbors.shape)} on {neighbors.device}, expected torch.int32 "
            f"(N_out, K) on {x.device}"
        )


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, neighbors = inputs
    ctx.save_for_backward(neighbors)
    ctx.rows = x.shape[0]


def _sum_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (neighbors,) = ctx.saved_tensors
    return SUM_DGRAD(grad, neighbors, ctx.rows), None


def _save_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, neighbors = inputs
    ctx.save_for_backward(output[1], neighbors)
    ctx.rows = x.shape[0]
    ctx.mark_non_differentiable(output[1])


def _max_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    taps, neighbors = ctx.saved_tensors
    return MAX_DGRAD(grad, taps, neighbors, ctx.rows), None


def _sum_dgrad(grad: Tensor, neighbors: Tensor, rows: int) -> Tensor:
    return reference.sparse_sum_pool(grad, exchanged(neighbors, rows))


SUM = Op(
    "sparse_sum_pool(Tensor x, Tensor neighbors) -> Tensor",
    fake=lambda x, neighbors: x.new_empty((neighbors.shape[0], x.shape[1])),
    gradient=(_sum_gradient, _save_sum),
)
SUM_DGRAD = Op(
    "sparse_sum_pool_dgrad(Tensor grad, Tensor neighbors, SymInt rows) -> Tensor",
    fake=lambda grad, neighbors, rows: grad.new_empty((rows, grad.shape[1])),
)
MAX = Op(
    "sparse_max_pool(Tensor x, Tensor neighbors) -> (Tensor, Tensor)",
    fake=lambda x, neighbors: (
        x.new_empty((neighbors.shape[0], x.shape[1])),
        x.new_empty((neighbors.shape[0], x.shape[1]), dtype=torch.int16),
    ),
    gradient=(_max_gradient, _save_max),
)
MAX_DGRAD = Op(
    "sparse_max_pool_dgrad(Tensor grad, Tensor taps, Tensor neighbors, SymInt rows) -> Tensor",
    fake=lambda grad, taps, neighbors, rows: grad.new_empty((rows, grad.shape[1])),
)
for _op, _run in (
    (SUM, reference.sparse_sum_pool),
    (SUM_DGRAD, _sum_dgrad),
    (MAX, reference.sparse_max_pool),
    (MAX_DGRAD, reference.sparse_max_pool_dgrad),
):
    _op.register(Implementation("reference", _run, ("cpu", "cuda")))
