"""A street that a lidar of 64 beams sees, made by casting its rays: for machines that have no real scan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GROUND = -1.73
"""Height of the ground in metres; the sensor is the origin."""
REACH = 80.0
NOISE = 0.02
LEAST_POINTS = 30
CAR = 2
"""Label of a car in KITTI's three classes: pedestrian, cyclist, car."""

# In metres: length, width, height of a small car, a saloon, an estate, a van.
SIZES = np.array([(3.55, 1.62, 1.49), (4.25, 1.74, 1.46), (4.62, 1.81, 1.52), (4.85, 1.93, 1.92)])
LANES = (-3.2, 3.3, -6.6, 6.7)
REFLECTANCE = {"ground": 0.22, "car": 0.45, "wall": 0.33, "pole": 0.6}


@dataclass(frozen=True)
class Scan:
    """A labelled scan in the coordinates of its lidar: x forward, y left, z up, in metres.

    Attributes:
        name: what the report calls it.
        points: float32 ``(N, 4)``: x, y, z and intensity in [0, 1].
        boxes: float32 ``(M, 7)``: centre of the bottom face, length, width, height, yaw about z from x, as mmdet3d's
            ``LiDARInstance3DBoxes`` has them.
        labels: int64 ``(M,)``, of KITTI's three classes.
        file: the points, where they come from one.
    """

    name: str
    points: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    file: Path | None = None


def simulate(seed: int = 0) -> Scan:
    """A street with eight cars, walls and poles; the same seed gives the same scan.

    A ray ends at the first surface it meets, so what stands behind another thing is hidden. Ranges have a noise of
    2 cm. Cars that fewer than 30 points fall on have no box.
    """
    generator = np.random.default_rng(seed)
    cars = place_cars(generator)
    walls, poles = place_walls(), place_poles(generator)
    solids = np.concatenate([cars, walls, poles])
    kinds = ("car",) * len(cars) + ("wall",) * len(walls) + ("pole",) * len(poles)
    reflectance = np.array([*(REFLECTANCE[kind] for kind in kinds), REFLECTANCE["ground"]])  # the ground is number -1
    paint = generator.uniform(0.6, 1.4, len(reflectance))

    rays = directions()
    distance, surface, cosine = cast(rays, solids)
    met = distance < REACH
    rays, distance, surface, cosine = rays[met], distance[met], surface[met], cosine[met]
    xyz = rays * (distance + generator.normal(0, NOISE, len(distance)))[:, None]
    intensity = (reflectance * paint)[surface] * (0.3 + 0.7 * cosine) + generator.normal(0, 0.03, len(distance))
    points = np.concatenate([xyz, intensity.clip(0, 1)[:, None]], axis=1)

    seen = np.bincount(surface[surface >= 0], minlength=len(solids))[: len(cars)] >= LEAST_POINTS
    return Scan(
        "a simulated street",
        points.astype(np.float32),
        cars[seen].astype(np.float32),
        np.full(int(seen.sum()), CAR, np.int64),
    )


def directions() -> Array:
    """Unit vectors ``(R, 3)`` of an HDL-64E's beams over the 90 degrees in front of it.

    The upper half of the beams are 1/3 degree apart, the lower half 1/2; the head turns by 0.2 degrees.
    """
    elevation = np.radians(np.concatenate([2 - np.arange(32) / 3, -8.83 - np.arange(32) / 2]))
    azimuth = np.radians(np.arange(-45, 45.1, 0.2))
    elevation, azimuth = (axis.ravel() for axis in np.meshgrid(elevation, azimuth, indexing="ij"))
    flat = np.cos(elevation)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=1)


def cast(rays: Array, solids: Array) -> tuple[Array, NDArray[np.int64], Array]:
    """Where rays from the origin end.

    Args:
        rays: unit vectors ``(R, 3)``.
        solids: boxes ``(B, 7)`` as in :class:`Scan`; the origin is in none of them.

    Returns:
        Distance, infinite where nothing is met; number of the box met, -1 for the ground; cosine of the angle between
        the ray and the surface's normal. Each ``(R,)``.
    """
    down = rays[:, 2] < 0
    ground = np.where(down, GROUND / np.where(down, rays[:, 2], 1), np.inf)
    if not len(solids):
        return ground, np.full(len(rays), -1), np.abs(rays[:, 2])
    # In a box's own frame it is aligned with the axes, and a ray is in it while it is between all three pairs of faces.
    local = _turn(rays[:, None, :], -solids[:, 6])
    centre = solids[:, :3] + np.stack([np.zeros(len(solids))] * 2 + [solids[:, 5] / 2], axis=1)
    origin = _turn(-centre, -solids[:, 6])
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (-solids[:, 3:6] / 2 - origin) / local
        second = (solids[:, 3:6] / 2 - origin) / local
    # A ray along a face is 0 / 0: neither in nor out, it meets nothing of that pair.
    enter, leave = np.fmin(first, second), np.fmax(first, second)
    face = enter.argmax(axis=2)
    begin, end = enter.max(axis=2), leave.min(axis=2)
    distance = np.where((begin <= end) & (begin > 0), begin, np.inf)

    every = np.arange(len(rays))
    nearest = distance.argmin(axis=1)
    near = distance[every, nearest]
    grounded = ground <= near
    side = np.abs(local[every, nearest, face[every, nearest]])
    return (
        np.where(grounded, ground, near),
        np.where(grounded, -1, nearest),
        np.where(grounded, np.abs(rays[:, 2]), side),
    )


def inside(points: NDArray[np.floating], box: NDArray[np.floating], margin: float = 0.0) -> NDArray[np.bool_]:
    """Which points ``(N, 3)`` lie in a box ``(7,)`` whose faces are moved out by ``margin``."""
    centre = box[:3] + np.array([0, 0, box[5] / 2])
    return np.asarray((np.abs(_turn(points - centre, -box[6])) <= box[3:6] / 2 + margin).all(axis=1))


def corners(box: NDArray[np.floating]) -> Array:
    """The four corners ``(4, 2)`` of a box ``(7,)`` seen from above; the first and the last are those in front."""
    x, y = box[3] / 2, box[4] / 2
    outline = np.array([(x, y, 0), (-x, y, 0), (-x, -y, 0), (x, -y, 0)])
    return box[:2] + _turn(outline, box[6])[:, :2]


def place_cars(generator: np.random.Generator) -> Array:
    """Boxes ``(8, 7)`` of cars along four lanes, the last one across the street."""
    count = 8
    size = SIZES[generator.integers(0, len(SIZES), count)]
    x = 8 + 5.2 * np.arange(count) + generator.uniform(-0.8, 0.8, count)
    y = np.resize(LANES, count) + generator.uniform(-0.4, 0.4, count)
    yaw = np.where(y < 0, 0.0, np.pi) + generator.normal(0, 0.06, count)
    yaw[-1] = np.pi / 2 + generator.normal(0, 0.2)
    yaw = (yaw + np.pi) % (2 * np.pi) - np.pi
    return np.column_stack([x, y, np.full(count, GROUND), size, yaw])


def place_walls() -> Array:
    """Houses left and right with gaps between them, and one at the end of the street."""
    sides = [
        (x, y, GROUND, 13.0, 1.0, 6.0, 0.0)
        for y, starts in ((13.5, (14, 30, 46, 62)), (-14.5, (20, 37, 55)))
        for x in starts
    ]
    return np.array([*sides, (72.0, 0.0, GROUND, 1.0, 24.0, 8.0, 0.0)])


def place_poles(generator: np.random.Generator) -> Array:
    """Lamp posts along both pavements."""
    x = np.repeat(np.arange(13.0, 60.0, 12.0), 2) + generator.uniform(-1, 1, 8)
    y = np.tile([9.8, -9.8], 4)
    return np.column_stack([x, y, np.full(8, GROUND), np.tile([0.2, 0.2, 5.0, 0.0], (8, 1))])


def _turn(vectors: NDArray[np.floating], angle: NDArray[np.floating] | float) -> Array:
    """Vectors ``(..., 3)`` turned about z by angles that broadcast with all axes but the last."""
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.stack(np.broadcast_arrays(cosine * x - sine * y, sine * x + cosine * y, z), axis=-1)
