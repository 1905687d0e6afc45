"""Furthest point sampling on a GPU: one program for each cloud, which stays in registers where it fits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_REGISTERS = 8192  # points: their places and how far they are, 32 numbers of each thread; with more they spill
TILE = 4096  # points, where there are more


def furthest_points(values: Tensor, nearest: Tensor, samples: int, distances: bool) -> tuple[Tensor, Tensor]:
    clouds, points = nearest.shape
    nearest = nearest.clone(memory_format=torch.contiguous_format)
    found = torch.zeros((clouds, samples), dtype=torch.int32, device=values.device)
    if clouds and points and samples > 1:
        # Coordinates by axis, so that neighbouring threads read neighbouring numbers.
        values = values.contiguous() if distances else values.transpose(1, 2).contiguous()
        fits = points <= IN_REGISTERS and not distances
        block = max(32, triton.next_power_of_2(points)) if fits else min(TILE, triton.next_power_of_2(points))
        with torch.cuda.device_of(values):
            sample_kernel[clouds,](
                values, nearest, found, points, samples,
                DISTANCES=distances, FITS=fits, BLOCK=block, num_warps=max(1, min(32, block // 128)),
            )  # fmt: skip
    return found, nearest


@triton.jit
def _furthest(near, at, points):
    """Of numbers that are not negative the bits are in the same order; the lowest place wins among equals."""
    bits = near.to(tl.int32, bitcast=True).to(tl.int64)
    key = (bits << 32) | (0x7FFFFFFF - at).to(tl.int64)
    return tl.max(tl.where(at < points, key, -1), 0)


@triton.jit
def sample_kernel(
    values, nearest, found, points, samples, DISTANCES: tl.constexpr, FITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Programs ``(cloud,)``; ``values`` is ``(clouds, 3, points)``, or ``(clouds, points, points)`` of DISTANCES."""
    cloud = tl.program_id(0).to(tl.int64)
    nearest += cloud * points
    found += cloud * samples
    if DISTANCES:
        values += cloud * points * points
    else:
        values += cloud * points * 3
    at = tl.arange(0, BLOCK)
    chosen = tl.zeros((), tl.int64)
    if FITS:
        inside = at < points
        xs = tl.load(values + at, mask=inside, other=0)
        ys = tl.load(values + points + at, mask=inside, other=0)
        zs = tl.load(values + 2 * points + at, mask=inside, other=0)
        near = tl.load(nearest + at, mask=inside, other=0)
        for sample in range(1, samples):
            dx = xs - tl.load(values + chosen)
            dy = ys - tl.load(values + points + chosen)
            dz = zs - tl.load(values + 2 * points + chosen)
            away = dx * dx + dy * dy + dz * dz
            near = tl.where(away < near, away, near)
            chosen = 0x7FFFFFFF - (_furthest(near, at, points) & 0xFFFFFFFF)
            tl.store(found + sample, chosen.to(tl.int32))
        tl.store(nearest + at, near, mask=inside)
    else:
        for sample in range(1, samples):
            best = tl.full((), -1, tl.int64)
            for begin in range(0, points, BLOCK):
                place = begin + at
                inside = place < points
                if DISTANCES:
                    away = tl.load(values + chosen * points + place, mask=inside, other=0)
                else:
                    dx = tl.load(values + place, mask=inside, other=0) - tl.load(values + chosen)
                    dy = tl.load(values + points + place, mask=inside, other=0) - tl.load(values + points + chosen)
                    dz = tl.load(values + 2 * points + place, mask=inside, other=0)
                    dz -= tl.load(values + 2 * points + chosen)
                    away = dx * dx + dy * dy + dz * dz
                near = tl.load(nearest + place, mask=inside, other=0)
                near = tl.where(away < near, away, near)
                tl.store(nearest + place, near, mask=inside)
                best = tl.maximum(best, _furthest(near, place, points))
            chosen = 0x7FFFFFFF - (best & 0xFFFFFFFF)
            tl.store(found + sample, chosen.to(tl.int32))
            tl.debug_barrier()  # what is nearest is read again, perhaps by other threads


def supports_furthest_points(values: Tensor, *_: object) -> str | None:
    if values.dtype != torch.float32:
        return f"{values.dtype} is computed by the reference"
    return None
