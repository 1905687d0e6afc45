"""Neighbours on a GPU: one program for each center goes over the points of its cloud, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import squared

TILE = 512  # points
MOST_NEIGHBORS = 128  # held in registers


def points_knn(
    points: Tensor, centers: Tensor, point_starts: Tensor, center_starts: Tensor, neighbors: int
) -> tuple[Tensor, Tensor]:
    rows = torch.empty((len(centers), neighbors), dtype=torch.int32, device=points.device)
    squares = points.new_empty((len(centers), neighbors))
    if len(centers):
        with torch.cuda.device_of(points):
            nearest_kernel[len(centers),](
                points.contiguous(), centers.contiguous(), point_starts.contiguous(),
                _clouds(center_starts, len(centers)), rows, squares, neighbors,
                WIDTH=max(2, triton.next_power_of_2(neighbors)), TILE=TILE, num_warps=4,
            )  # fmt: skip
    return rows, squares


def points_in_ball(
    points: Tensor,
    centers: Tensor,
    point_starts: Tensor,
    center_starts: Tensor,
    min_radius: float,
    max_radius: float,
    samples: int,
) -> Tensor:
    rows = torch.empty((len(centers), samples), dtype=torch.int32, device=points.device)
    if len(centers):
        with torch.cuda.device_of(points):
            within_kernel[len(centers),](
                points.contiguous(), centers.contiguous(), point_starts.contiguous(),
                _clouds(center_starts, len(centers)), rows, squared(min_radius), squared(max_radius), samples,
                TILE=TILE, num_warps=4,
            )  # fmt: skip
    return rows


def _clouds(starts: Tensor, centers: int) -> Tensor:
    """The cloud of each center; the last one's where counts do not add up, for nothing must be read beyond."""
    found = torch.searchsorted(starts, torch.arange(centers, device=starts.device), right=True) - 1
    return found.clamp_(max=len(starts) - 2)


@triton.jit
def _squares(points, at, inside, x, y, z):
    dx = x - tl.load(points + at * 3, mask=inside, other=0)
    dy = y - tl.load(points + at * 3 + 1, mask=inside, other=0)
    dz = z - tl.load(points + at * 3 + 2, mask=inside, other=0)
    return dx * dx + dy * dy + dz * dz


@triton.jit
def nearest_kernel(
    points, centers, starts, clouds, rows, squares, neighbors, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Programs ``(center,)``. A candidate is one number: the bits of its squared distance above its own."""
    center = tl.program_id(0).to(tl.int64)
    x, y, z = tl.load(centers + center * 3), tl.load(centers + center * 3 + 1), tl.load(centers + center * 3 + 2)
    cloud = tl.load(clouds + center)
    first, last = tl.load(starts + cloud), tl.load(starts + cloud + 1)
    lane = tl.arange(0, WIDTH).to(tl.int64)
    nothing: tl.constexpr = 0x7F800000 << 32  # infinitely far
    # Those that are not asked for can never be replaced; the others are all different, each in its own lane.
    kept = tl.where(lane < neighbors, nothing + 0x7FFFFFFF - lane, -1)
    for begin in range(first, last, TILE):
        at = begin + tl.arange(0, TILE)
        away = _squares(points, at, at < last, x, y, z)
        finite = (at < last) & (away < float("inf"))
        bits = away.to(tl.int32, bitcast=True).to(tl.int64)
        tile = tl.where(finite, (bits << 32) | (at - first), (1 << 63) - 1)
        worst = tl.max(kept, 0)
        best = tl.min(tile, 0)
        while best < worst:
            kept = tl.where(kept == worst, best, kept)
            tile = tl.where(tile == best, (1 << 63) - 1, tile)
            worst = tl.max(kept, 0)
            best = tl.min(tile, 0)
    kept = tl.sort(tl.where(kept < 0, (1 << 63) - 1, kept))
    square = (kept >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    row = tl.where(kept >= nothing, -1, kept & 0xFFFFFFFF).to(tl.int32)
    place = center * neighbors + lane
    tl.store(rows + place, row, mask=lane < neighbors)
    tl.store(squares + place, tl.where(kept >= nothing, float("inf"), square), mask=lane < neighbors)


@triton.jit
def within_kernel(points, centers, starts, clouds, rows, low, high, samples, TILE: tl.constexpr):
    """Programs ``(center,)``."""
    center = tl.program_id(0).to(tl.int64)
    x, y, z = tl.load(centers + center * 3), tl.load(centers + center * 3 + 1), tl.load(centers + center * 3 + 2)
    cloud = tl.load(clouds + center)
    begin, last = tl.load(starts + cloud), tl.load(starts + cloud + 1)
    start, rows = begin, rows + center * samples
    taken = tl.zeros((), tl.int32)
    leader = tl.full((), -1, tl.int32)
    while (begin < last) & (taken < samples):
        at = begin + tl.arange(0, TILE)
        away = _squares(points, at, at < last, x, y, z)
        near = (at < last) & ((away == 0) | ((away >= low) & (away < high)))
        place = taken + tl.cumsum(near.to(tl.int32), 0) - 1
        number = (at - start).to(tl.int32)
        tl.store(rows + place, number, mask=near & (place < samples))
        lowest = tl.min(tl.where(near, number, 0x7FFFFFFF), 0)
        leader = tl.where((leader < 0) & (lowest < 0x7FFFFFFF), lowest, leader)
        taken += tl.sum(near.to(tl.int32), 0)
        begin += TILE
    for fill in range(0, samples, TILE):
        place = fill + tl.arange(0, TILE)
        tl.store(rows + place, leader + tl.zeros((TILE,), tl.int32), mask=(place >= taken) & (place < samples))


def supports_points_knn(
    points: Tensor, centers: Tensor, point_starts: Tensor, center_starts: Tensor, neighbors: int
) -> str | None:
    if neighbors > MOST_NEIGHBORS:
        return f"{neighbors} neighbours are more than the {MOST_NEIGHBORS} that registers hold"
    return supports_points_in_ball(points)


def supports_points_in_ball(points: Tensor, *_: object) -> str | None:
    if points.dtype != torch.float32:
        return f"{points.dtype} is computed by the reference"
    return None
