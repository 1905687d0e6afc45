"""Which tile a GPU takes: a plan that was measured there, or a rule."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

from kernelgraft_core.runtime.plans import PLANS, Scalar

VERSION = 1  # of tiles; a new version makes stored plans void


@dataclass(frozen=True)
class Tile:
    """Rows and output channels of a tile, input channels of a step, and how it is launched.

    Of the gradient of a weight: input channels, output channels, and pairs of a step.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Product:
    """What a plan is kept under: direction, dataflow, channels of a group, bytes of a number, and how many rows, which
    are a power of two: :meth:`of` rounds them up.
    """

    direction: str
    dataflow: str
    rows: int
    cin: int
    cout: int
    bytes: int
    arch: str

    @classmethod
    def of(cls, direction: str, dataflow: str, rows: int, cin: int, cout: int, size: int, arch: str) -> Product:
        """Of any number of rows."""
        return cls(direction, dataflow, _power(rows), cin, cout, size, arch)

    @property
    def shape(self) -> dict[str, Scalar]:
        """For the plan store."""
        return {
            "direction": self.direction, "dataflow": self.dataflow, "rows": self.rows, "cin": self.cin,
            "cout": self.cout, "bytes": self.bytes,
        }  # fmt: skip


OP = "sparse_conv"
# Chosen by what ahead-of-time compiling shows: no spills, and at least two gathered tiles in flight. By output channels
# of a tile; a step takes as many input channels as there are, up to the depth.
PRODUCTS = {
    16: (Tile(128, 16, 64, 4, 6), Tile(64, 16, 64, 4, 8)),
    32: (Tile(128, 32, 64, 4, 6), Tile(64, 32, 64, 4, 8)),
    64: (Tile(128, 64, 32, 4, 6), Tile(64, 64, 64, 4, 8)),
    128: (Tile(64, 128, 32, 4, 6), Tile(128, 128, 32, 8, 8)),
}
FETCHES = {  # no room is needed for taps that are not there: pairs of one tap are few
    16: (Tile(64, 16, 64, 4, 4),),
    32: (Tile(64, 32, 64, 4, 4),),
    64: (Tile(32, 64, 64, 2, 4),),
}
GRADIENTS = {
    16: (Tile(16, 16, 64, 1, 6), Tile(16, 16, 128, 4, 6)),
    32: (Tile(32, 32, 64, 4, 6), Tile(32, 32, 32, 4, 8)),
    64: (Tile(64, 64, 32, 4, 6), Tile(64, 64, 64, 4, 6)),
    128: (Tile(64, 128, 32, 4, 6), Tile(128, 128, 32, 8, 6)),
}
WIDE = {4: 4}  # four-byte numbers take a quarter of the depth: three products of each, in as many registers


@functools.lru_cache(maxsize=1024)
def candidates(product: Product) -> dict[str, Tile]:
    """By name, what may be measured or stored; kept, for every call of an op asks."""
    fetches = product.dataflow.startswith("fetch")
    table = GRADIENTS if product.direction == "wgrad" else FETCHES if fetches else PRODUCTS
    sizes = [size for size in table if size <= max(16, _power(product.cout))][-2:]
    if product.direction == "wgrad":
        sizes = [size for size in sizes if size <= max(16, 2 * _power(product.cin))] or [16]
    tiles = [_fitted(tile, product) for size in reversed(sizes) for tile in table[size]]
    return {f"{t.rows}x{t.columns}x{t.depth}-w{t.warps}-s{t.stages}": t for t in tiles}


def choose(product: Product) -> Tile:
    """A stored plan where it is one of the candidates, else the first of them."""
    known = candidates(product).values()
    stored = PLANS.lookup(OP, VERSION, product.arch, product.shape)
    planned = (tile for tile in known if stored is not None and asdict(tile) == dict(stored))
    return next(planned, next(iter(known)))


def _fitted(tile: Tile, product: Product) -> Tile:
    depth = tile.depth // WIDE.get(product.bytes, 1)
    if product.direction != "wgrad":
        depth = min(depth, max(16, _power(product.cin)))
    return Tile(tile.rows, tile.columns, max(16, depth), tile.warps, tile.stages)


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
