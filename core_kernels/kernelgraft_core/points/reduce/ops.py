"""Public ops that reduce the points of each voxel: dynamic scatter, as OpenMMLab calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred
from kernelgraft_core.sparse.grids import LARGEST_KEY, grid_steps, starts_of
from kernelgraft_core.sparse.maps.ops import sparse_sort

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("sum", "mean", "max")
LARGEST_SITE = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class VoxelGroups:
    """Which points are in which of M voxels.

    Attributes:
        coordinates: ``(M, D)``, ascending, the first axis first; dtype of what they were made of.
        rows: int32 ``(N,)``: the voxel of each point, -1 for none.
        order: int64 ``(P,)``: the points that have a voxel, voxel by voxel, ascending within each.
        starts: int64 ``(M + 1,)``: where each voxel begins in ``order``.
    """

    coordinates: Tensor
    rows: Tensor
    order: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """How many points each voxel has, int32 ``(M,)``, all at least 1."""
        return self.starts.diff().int()


def voxel_groups(coordinates: Tensor) -> VoxelGroups:
    """Points of equal coordinates.

    Args:
        coordinates: int32 or int64 ``(N, D)``; a point with a negative one belongs to no voxel.

    Raises:
        ValueError: the shape or dtype is wrong.
    """
    if (
        coordinates.dim() != 2
        or coordinates.shape[1] < 1
        or coordinates.dtype not in (torch.int32, torch.int64)
        or len(coordinates) > LARGEST_SITE
    ):
        raise ValueError(
            f"coordinates is {coordinates.dtype} {tuple(coordinates.shape)}, expected torch.int32 or torch.int64 (N, D)"
        )
    points = len(coordinates)
    inside = (coordinates >= 0).all(1)
    kept = inside.nonzero().squeeze(1)
    sites = coordinates if len(kept) == points else coordinates[kept]
    rows = torch.full((points,), -1, dtype=torch.int32, device=coordinates.device)
    if not len(kept):
        return VoxelGroups(coordinates[:0], rows, kept, kept.new_zeros(1))
    keys, order = _sorted_keys(sites)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    first = begins.nonzero().squeeze(1)
    starts = torch.cat((first, first.new_tensor([len(keys)])))
    found = sites if order is None else sites[order]
    order = kept if order is None else kept[order]
    rows[order] = (begins.cumsum(0) - 1).int()
    return VoxelGroups(found[first], rows, order, starts)


def _sorted_keys(sites: Tensor) -> tuple[Tensor, Tensor | None]:
    """Numbers that are equal and ascend where rows do, and the rows of each; None for their own order."""
    sizes = [size + 1 for size in sites.amax(0).tolist()]
    count = 1
    for size in sizes:
        count *= size
    if max(sizes) <= LARGEST_SITE and count < LARGEST_KEY:
        return sparse_sort(sites.int(), grid_steps(sizes[1:], sizes[0]))
    _, group = sites.unique(dim=0, return_inverse=True)
    keys, order = group.sort(stable=True)
    return keys, order


def scatter_points(feats: Tensor, coordinates: Tensor, reduce: str = "mean") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce the features of points that share a voxel (dynamic voxelization, arXiv 1910.06528).

    Args:
        feats: ``(N, C)`` float16, bfloat16, float32 or float64. Sums are in float32 at least, and do not depend on the
            number of threads.
        coordinates: see :func:`voxel_groups`.
        reduce: ``"sum"``, ``"mean"`` or ``"max"``. NaN takes no part in a maximum, which is -inf where nothing else is.

    Returns:
        features ``(M, C)``, differentiable: a maximum passes its gradient to the first point that has it; coordinates
        ``(M, D)``, ascending; the voxel of each point int32 ``(N,)``, -1 for none; points of each voxel int32 ``(M,)``.

    Raises:
        ValueError: shapes, dtypes or devices are wrong, or there is no such reduction.
    """
    if len(coordinates) != len(feats) or coordinates.device != feats.device:
        raise ValueError(
            f"coordinates is {tuple(coordinates.shape)} on {coordinates.device}, feats {tuple(feats.shape)} on "
            f"{feats.device}"
        )
    groups = voxel_groups(coordinates)
    return reduce_groups(feats, groups.order, groups.starts, reduce), groups.coordinates, groups.rows, groups.counts


def reduce_groups(feats: Tensor, order: Tensor, starts: Tensor, reduce: str) -> Tensor:
    """Reduce the rows ``order[starts[m]:starts[m + 1]]`` of ``feats (N, C)`` for every m; see :func:`scatter_points`.

    Where there are none, sums and means are 0, and maxima -inf.

    Args:
        feats: floating point ``(N, C)``.
        order: int64 ``(P,)`` rows of ``feats``, none twice; starts: int64 ``(M + 1,)``, ascending,
            within 0 to P.
        reduce: ``"sum"``, ``"mean"`` or ``"max"``.

    Raises:
        ValueError: as for :func:`scatter_points`; on a CPU, and outside of compiled code, also numbers out of range.
    """
    check_reduction(feats, reduce)
    for name, tensor in (("order", order), ("starts", starts)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.device != feats.device or not len(starts):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected torch.int64 of one "
                f"dimension on {feats.device}, one more of starts than there are groups"
            )
    if feats.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere asking would wait
        if len(order) and (int(order.min()) < 0 or int(order.max()) >= len(feats)):
            raise ValueError(
                f"order goes from {int(order.min())} to {int(order.max())}, expected 0 to {len(feats) - 1}"
            )
        if int(starts[0]) < 0 or int(starts[-1]) > len(order) or bool((starts[1:] < starts[:-1]).any()):
            raise ValueError(f"starts is {starts.tolist()}, expected to ascend from 0 to {len(order)}")
    out: Tensor = REDUCE(feats, order, starts, reduce)[0]
    return out


def largest_rows(feats: Tensor, rows: Tensor, groups: int) -> Tensor:
    """The first point that has the maximum of each group and channel, int64 ``(M, C)``, -1 where there is none.

    Args:
        feats: floating point ``(N, C)``.
        rows: int32 or int64 ``(N,)``: the group of each point, below ``groups``; negative for none.

    Raises:
        ValueError: shapes or dtypes are wrong.
    """
    check_reduction(feats, "max")
    if rows.shape != (len(feats),) or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)}, expected torch.int32 or torch.int64 ({len(feats)},)"
        )
    found: Tensor = REDUCE(feats, *members_of(rows, groups), "max")[1]
    return found


def members_of(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Points in the order of their groups, and where each group begins, as :func:`reduce_groups` takes them.

    Args:
        rows: int32 or int64 ``(N,)``: the group of each point, below ``groups``; negative for none.
    """
    # Those without a group come first, as if they had one of their own. No shape depends on how many there are.
    group = rows.long().clamp(min=-1) + 1
    counts = group.new_zeros(groups + 1).index_add(0, group, torch.ones_like(group))
    return group.argsort(stable=True), starts_of(counts)[1:]


def pass_to_largest(grad: Tensor, source: Tensor, points: int) -> Tensor:
    """Gradient of a maximum, ``(N, C)``: that of each group and channel goes to the point it came from."""
    # A point is in one group: no two write to one place. What came from nowhere goes to a row that is dropped.
    found = grad.new_zeros((points + 1, grad.shape[1]))
    return found.scatter(0, torch.where(source < 0, points, source), grad)[:points]


def check_reduction(feats: Tensor, reduce: str) -> None:
    if feats.dim() != 2 or feats.dtype not in FLOATS:
        raise ValueError(f"feats is {feats.dtype} {tuple(feats.shape)}, expected floating point (N, C)")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}, expected one of {REDUCTIONS}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    feats, order, starts, ctx.reduce = inputs
    ctx.points = feats.shape[0]
    ctx.save_for_backward(order, starts, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    order, starts, source = ctx.saved_tensors
    if ctx.reduce == "max":
        return pass_to_largest(grad, source, ctx.points), None, None, None
    if ctx.reduce == "mean":
        grad = grad / starts.diff().clamp(min=1).unsqueeze(1).to(grad.dtype)
    # One more, for what is in no group.
    grad = torch.cat((grad, grad.new_zeros((1, grad.shape[1]))))
    group = torch.searchsorted(starts, torch.arange(order.shape[0], device=order.device), right=True) - 1
    spread = grad[torch.where(group < 0, grad.shape[0] - 1, group)]
    return grad.new_zeros((ctx.points, grad.shape[1])).index_copy(0, order, spread), None, None, None


def _fake(feats: Tensor, order: Tensor, starts: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    out = feats.new_empty((starts.shape[0] - 1, feats.shape[1]))
    return out, out.new_empty(out.shape if reduce == "max" else (0,), dtype=torch.int64)


REDUCE = Op(
    "points_reduce(Tensor feats, Tensor order, Tensor starts, str reduce) -> (Tensor, Tensor)",
    fake=_fake,
    gradient=(_gradients, _save),
)
REDUCE.register(Implementation("reference", reference.points_reduce, ("cpu", "cuda")))
for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
    _run, _supports = (
        deferred(f"kernelgraft_core.points.reduce.{_backend}", name)
        for name in ("points_reduce", "supports_points_reduce")
    )
    REDUCE.register(Implementation(_backend, _run, (_device,), 10, _supports))
