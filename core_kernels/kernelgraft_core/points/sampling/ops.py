"""Public ops of furthest point sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def furthest_point_sampling(points: Tensor, samples: int, nearest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Points each of which is the furthest from those before it (Eldar et al. 1997; PointNet++, arXiv 1706.02413).

    The first is number 0. Among equally far ones the lowest number is taken. Points should be finite; others give some
    numbers of points.

    Args:
        points: ``(B, N, 3)`` float16, bfloat16, float32 or float64; half types are computed in float32.
        samples: how many, 0 or more. Beyond the number of different points some come again.
        nearest: ``(B, N)``, squared distance of each point to what has been chosen before, not negative; by default
            infinite. float64 for float64 points, otherwise float32.

    Returns:
        int32 ``(B, samples)``, and ``nearest`` after all samples but the last.

    Raises:
        ValueError: a shape or dtype is wrong, or there are no points to choose from.
    """
    if points.dim() != 3 or points.shape[2] != 3 or points.dtype not in FLOATS:
        raise ValueError(f"points is {points.dtype} {tuple(points.shape)}, expected floating point (B, N, 3)")
    return _sample(points, samples, nearest, False)


def furthest_point_sampling_with_distances(
    distances: Tensor, samples: int, nearest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`furthest_point_sampling` of points whose distances from each other are known (3DSSD, arXiv 2002.10187).

    Args:
        distances: ``(B, N, N)``, not negative; row ``i`` holds those from point ``i``.
        samples, nearest: see :func:`furthest_point_sampling`; ``nearest`` is in the unit of ``distances``.

    Raises:
        ValueError: as for :func:`furthest_point_sampling`.
    """
    if distances.dim() != 3 or distances.shape[1] != distances.shape[2] or distances.dtype not in FLOATS:
        raise ValueError(f"distances is {distances.dtype} {tuple(distances.shape)}, expected floating point (B, N, N)")
    return _sample(distances, samples, nearest, True)


def _sample(values: Tensor, samples: int, nearest: Tensor | None, distances: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(values.dtype, torch.float32)
    shape = values.shape[:2]
    if nearest is None:
        nearest = values.new_full(shape, math.inf, dtype=wide)
    if nearest.shape != shape or nearest.dtype != wide or nearest.device != values.device:
        raise ValueError(
            f"nearest is {nearest.dtype} {tuple(nearest.shape)} on {nearest.device}, expected {wide} {tuple(shape)} on "
            f"{values.device}"
        )
    if samples < 0 or (samples and not shape[1]) or shape[1] >= 1 << 31:
        raise ValueError(f"cannot take {samples} samples of {shape[1]} points")
    found: tuple[Tensor, Tensor] = SAMPLE(values.to(wide), nearest, samples, distances)
    return found


SAMPLE = Op(
    "furthest_points(Tensor values, Tensor nearest, SymInt samples, bool distances) -> (Tensor, Tensor)",
    fake=lambda values, nearest, samples, distances: (
        values.new_empty((values.shape[0], samples), dtype=torch.int32),
        values.new_empty(nearest.shape),
    ),
)
SAMPLE.register(Implementation("reference", reference.furthest_points, ("cpu", "cuda")))
for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
    _run, _supports = (
        deferred(f"kernelgraft_core.points.sampling.{_backend}", name)
        for name in ("furthest_points", "supports_furthest_points")
    )
    SAMPLE.register(Implementation(_backend, _run, (_device,), 10, _supports))
