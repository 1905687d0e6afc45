"""Which tile of the W4A8 and W8A8 product a GPU takes: a plan that was measured there, or a rule."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

from kernelgraft_core.runtime.plans import PLANS, Scalar

COLUMNS = 64  # that words are made of; K is a multiple of it
MOST_SPLITS = 16
VERSION = 1  # of tiles; a new version makes stored plans void


@dataclass(frozen=True)
class Tile:
    """A tile of the product: rows of the weight, tokens and columns of a step, and how it is launched."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Product:
    """One product: its sizes, and the GPU: ``arch`` is a key of TILES, ``arch_key`` what its plans are kept under."""

    op: str
    tokens: int
    n: int
    k: int
    group: int
    arch: int
    arch_key: str
    processors: int

    @property
    def shape(self) -> dict[str, Scalar]:
        """What a plan is kept under: tokens rounded up to a power of two, the rest as it is."""
        return {"m": 1 << (self.tokens - 1).bit_length(), "n": self.n, "k": self.k, "group": self.group}


# By the tokens of a tile, the fewest first. Chosen by what ahead-of-time compiling shows: no spills, three tiles of
# every operand in flight, and the fewest instructions for a matrix product; on Hopper that takes longer steps.
FEW = Tile(64, 16, 128, 4, 4), Tile(64, 32, 128, 4, 4)
TILES = {
    80: (*FEW, Tile(128, 64, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    90: (*FEW, Tile(128, 64, 128, 4, 4), Tile(128, 128, 128, 8, 4)),
}


def choose(product: Product) -> tuple[Tile, int]:
    """A tile and the number of programs that share it along K: a stored plan where it is usable, else a rule."""
    stored = PLANS.lookup(product.op, VERSION, product.arch_key, product.shape)
    if stored is not None and (planned := _planned(product, tuple(stored.items()))):
        return planned
    tile = choose_tile(product.tokens, product.k, product.arch)
    return tile, choose_splits(_tiles(product, tile), product.k // tile.columns, product.processors)


def candidates(product: Product) -> dict[str, tuple[Tile, int]]:
    """By name, what may be measured: tiles that are not mostly empty, with K in up to :data:`MOST_SPLITS` parts."""
    found = {}
    product = replace(product, tokens=1 << (product.tokens - 1).bit_length())  # a plan is for all that share it
    for i, tile in enumerate(TILES[product.arch]):
        if i and tile.tokens > product.tokens:
            break
        tile = _whole_steps(tile, product.k)
        splits = 1
        while splits <= min(MOST_SPLITS, max(1, product.k // tile.columns // 2)):
            found[f"{tile.rows}x{tile.tokens}x{tile.columns}-w{tile.warps}-s{splits}"] = tile, splits
            splits *= 2
            if _tiles(product, tile) * splits > 8 * product.processors:
                break  # the GPU is full
    return found


def parameters(tile: Tile, splits: int) -> dict[str, Scalar]:
    """What a plan says."""
    return {**asdict(tile), "splits": splits}


def choose_tile(tokens: int, k: int, arch: int = 80) -> Tile:
    """By the number of tokens, on an architecture of at least ``arch``, 80 or 90; K has to be whole steps."""
    tiles = TILES[arch]
    return _whole_steps(next((tile for tile in tiles if tokens <= tile.tokens), tiles[-1]), k)


def choose_splits(tiles: int, steps: int, processors: int) -> int:
    """Programs that share a tile, so that there are about two on every multiprocessor and each has four steps."""
    return max(1, min(2 * processors // tiles, steps // 4, MOST_SPLITS))


@functools.lru_cache(maxsize=4096)
def _planned(product: Product, stored: tuple[tuple[str, Scalar], ...]) -> tuple[Tile, int] | None:
    return next((found for found in candidates(product).values() if parameters(*found) == dict(stored)), None)


def _whole_steps(tile: Tile, k: int) -> Tile:
    return tile if k % tile.columns == 0 else replace(tile, columns=COLUMNS)


def _tiles(product: Product, tile: Tile) -> int:
    return -(-product.tokens // tile.tokens) * -(-product.n // tile.rows)
