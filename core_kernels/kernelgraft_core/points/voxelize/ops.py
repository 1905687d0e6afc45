"""Public ops of voxelization: the voxel of each point, and the first points of each voxel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_SITE = (1 << 31) - 1


def dynamic_voxelize(points: Tensor, voxel_size: Sequence[float], point_range: Sequence[float]) -> Tensor:
    """The voxel of each point, int32 ``(N, D)``, the last axis first (``z, y, x``); -1 for points that have none.

    ``floor((p - low) / size)`` in the type of the points, float32 for the half types, as mmcv does it: equal to the
    last bit. A point that is outside of the range, infinite or not a number has no voxel.

    Args:
        points: floating point ``(N, C)``, of which the first D columns are places, in the unit of ``voxel_size``.
        voxel_size: D numbers above 0; float32 is what counts of them, and of ``point_range``.
        point_range: D lower and then D upper bounds. There are ``round((high - low) / size)`` voxels along an axis: a
            last one that is cut off counts where at least half of it is inside, and then as a whole one.

    Raises:
        ValueError: a shape, dtype or number is wrong, or the grid has more than 2^62 voxels.
    """
    _check_points(points, len(voxel_size))
    found: Tensor = DYNAMIC(points, [*map(float, voxel_size)], [*map(float, point_range)])
    return found


def hard_voxelize(
    points: Tensor, voxel_size: Sequence[float], point_range: Sequence[float], max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``max_points`` points of each of the first ``max_voxels`` voxels, both in the order of the points.

    The hard voxelization of VoxelNet (arXiv 1711.06396), deterministic. It has no gradient.

    Args:
        points, voxel_size, point_range: see :func:`dynamic_voxelize`.
        max_points: rows of a voxel, at least 1; max_voxels: at least 0.

    Returns:
        points of the voxels ``(M, max_points, C)``, 0 where there are none; int32 ``(M, D)``, the last axis first; and
        how many points each has, int32 ``(M,)``.

    Raises:
        ValueError: as for :func:`dynamic_voxelize`, or a bound is too small.
    """
    if max_points < 1 or max_voxels < 0:
        raise ValueError(f"max_points is {max_points} and max_voxels {max_voxels}, expected at least 1 and 0")
    most, channels = min(max_voxels, points.shape[0]), points.shape[-1]
    voxels = points.new_zeros((most, max_points, channels))
    coordinates = points.new_zeros((most, len(voxel_size)), dtype=torch.int32)
    counts = points.new_zeros((most,), dtype=torch.int32)
    number = int(hard_voxelize_into(points, voxel_size, point_range, voxels, coordinates, counts))
    return voxels[:number], coordinates[:number], counts[:number]


def hard_voxelize_into(
    points: Tensor,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    voxels: Tensor,
    coordinates: Tensor,
    counts: Tensor,
) -> Tensor:
    """:func:`hard_voxelize` into memory that is there; the sizes of ``voxels`` say how many voxels and points.

    Args:
        voxels: ``(max_voxels, max_points, C)``, dtype of the points, all 0: only what points fill is written.
        coordinates: int32 ``(max_voxels, D)``; counts: int32 ``(max_voxels,)``.

    Returns:
        How many voxels there are, an int64 scalar on the device of the points.

    Raises:
        ValueError: as for :func:`hard_voxelize`, or what is there does not fit.
    """
    _check_points(points, len(voxel_size))
    most, channels = voxels.shape[0] if voxels.dim() else 0, points.shape[1]
    if voxels.dim() != 3 or voxels.shape[1] < 1 or voxels.shape[2] != channels or voxels.dtype != points.dtype:
        raise ValueError(
            f"voxels is {voxels.dtype} {tuple(voxels.shape)}, expected {points.dtype} (M, P, {channels}), P at least 1"
        )
    for name, tensor, shape in (("coordinates", coordinates, (most, len(voxel_size))), ("counts", counts, (most,))):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected torch.int32 {shape}")
    for name, tensor in (("voxels", voxels), ("coordinates", coordinates), ("counts", counts)):
        if tensor.device != points.device:
            raise ValueError(f"{name} is on {tensor.device}, points on {points.device}")
    numbers = [*map(float, voxel_size)], [*map(float, point_range)]
    number: Tensor = HARD(points, *numbers, voxels, coordinates, counts)
    return number


# Whether the numbers make a grid is for `grid.grid_of` to say, inside of the ops: compilers do not follow float32.
def _check_points(points: Tensor, dimensions: int) -> None:
    if points.dim() != 2 or points.shape[1] < dimensions or points.dtype not in FLOATS:
        raise ValueError(
            f"points is {points.dtype} {tuple(points.shape)}, expected floating point (N, C), C at least {dimensions}"
        )
    if len(points) > LARGEST_SITE:
        raise ValueError(f"there are {len(points)} points, at most 2^31 - 1 are supported")


DYNAMIC = Op(
    "dynamic_voxelize(Tensor points, float[] voxel_size, float[] point_range) -> Tensor",
    fake=lambda points, voxel_size, point_range: points.new_empty(
        (points.shape[0], len(voxel_size)), dtype=torch.int32
    ),
)
HARD = Op(
    "hard_voxelize(Tensor points, float[] voxel_size, float[] point_range, Tensor(a!) voxels,"
    " Tensor(b!) coordinates, Tensor(c!) counts) -> Tensor",
    fake=lambda points, voxel_size, point_range, voxels, coordinates, counts: points.new_empty((), dtype=torch.int64),
)
for _op in (DYNAMIC, HARD):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    _run, _supports = (
        deferred("kernelgraft_core.points.voxelize.cpu", name) for name in (_op.name, f"supports_{_op.name}")
    )
    _op.register(Implementation("cpu", _run, ("cpu",), 10, _supports))
