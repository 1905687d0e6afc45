"""Kernel maps in the orders that GPU dataflows read them: by tile and tap, and by tap. On any device, without its
host waiting for a number.

What is packed has room for the worst case, which is as large as the map itself, and ends where device memory says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse.grids import starts_of

WORD = 62  # taps of a bitmask word: its number stays positive


@dataclass(frozen=True)
class PackedMap:
    """Tiles of outputs, each with a list of the taps that one of its rows has.

    Attributes:
        entries: int32 ``(E, BM)``: the input rows of one tap of one tile, -1 for none. Those of tile ``t`` are
            ``starts[t]`` to ``starts[t + 1]``.
        taps: int32 ``(E,)``, which tap that is.
        starts: int32 ``(S * T + 1,)``; tiles of the first part of the taps come first.
        order: int32 ``(S * T * BM,)``, the output row of each row of each tile; N_out where there is none.
        splits: S, parts of the taps, at least 1.
    """

    entries: Tensor
    taps: Tensor
    starts: Tensor
    order: Tensor
    splits: int

    @property
    def tiles(self) -> int:
        """T, of each part."""
        return (len(self.starts) - 1) // self.splits


@dataclass(frozen=True)
class TapPairs:
    """Pairs of rows, tap by tap: int32 ``inputs`` and ``outputs``, of tap ``k`` at ``starts[k]`` to
    ``starts[k + 1]``.
    """

    inputs: Tensor
    outputs: Tensor
    starts: Tensor


_packed: Derived[dict[tuple[int, int], PackedMap]] = Derived()
_pairs: Derived[TapPairs] = Derived()


def packed_map(neighbors: Tensor, splits: int, rows: int) -> PackedMap:
    """A kernel map ``(N_out, K)`` packed for tiles of ``rows`` outputs, made once; ``splits`` as in a dataflow."""
    known = _packed.of((neighbors,), dict)
    if (splits, rows) not in known:
        _refuse_capture(neighbors)
        known[splits, rows] = pack(neighbors, splits, rows)
    return known[splits, rows]


def tap_pairs(neighbors: Tensor) -> TapPairs:
    """The pairs of a kernel map, made once."""

    def make() -> TapPairs:
        _refuse_capture(neighbors)
        return make_tap_pairs(neighbors)

    return _pairs.of((neighbors,), make)


def _refuse_capture(neighbors: Tensor) -> None:
    """What is kept must not lie in the memory of a graph, nor wait for its replay."""
    if neighbors.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel map is packed at its first use: run the layer once before capturing a CUDA graph")


def bitmasks(neighbors: Tensor) -> Tensor:
    """Which taps each output has, int64 ``(N_out, W)``: bit ``k % 62`` of word ``k // 62`` for tap ``k``."""
    words = []
    for part in (neighbors >= 0).split(WORD, dim=1):
        bits = torch.arange(part.shape[1], device=part.device)
        words.append((part.long() << bits).sum(1))
    return torch.stack(words, 1) if words else neighbors.new_zeros((len(neighbors), 0), dtype=torch.int64)


def mask_order(neighbors: Tensor) -> Tensor:
    """Rows with equal bitmasks beside each other, int64 ``(N_out,)``: the largest number first, ties in their order."""
    order = torch.arange(len(neighbors), device=neighbors.device)
    for word in bitmasks(neighbors).T:  # the last word counts most, as a number's last digit but one does
        order = order[word[order].sort(descending=True, stable=True).indices]
    return order


def pack(neighbors: Tensor, splits: int, rows: int) -> PackedMap:
    """See :class:`PackedMap`."""
    count, taps = neighbors.shape
    tiles, parts = -(-count // rows), tap_parts(taps, splits)
    present, blocks, names, orders = [], [], [], []
    for first, last in parts:
        columns = neighbors[:, first:last]
        order = mask_order(columns) if splits else torch.arange(count, device=neighbors.device)
        orders.append(torch.nn.functional.pad(order.to(torch.int32), (0, tiles * rows - count), value=count))
        sorted_rows = torch.nn.functional.pad(columns[order], (0, 0, 0, tiles * rows - count), value=-1)
        block = sorted_rows.view(tiles, rows, last - first).transpose(1, 2).contiguous()  # (T, taps, BM)
        present.append((block >= 0).any(2))
        blocks.append(block.flatten(0, 1))
        names.append(torch.arange(first, last, dtype=torch.int32, device=neighbors.device).repeat(tiles))
    there = torch.cat([each.flatten() for each in present])
    place = there.cumsum(0) - 1
    # What is not there goes to a row of its own behind the others.
    place = torch.where(there, place, len(there))
    entries = neighbors.new_full((len(there) + 1, rows), -1).index_copy_(0, place, torch.cat(blocks))
    named = neighbors.new_zeros(len(there) + 1).index_copy_(0, place, torch.cat(names))
    counts = torch.cat([each.sum(1) for each in present])
    starts = starts_of(counts).to(torch.int32)
    return PackedMap(entries, named, starts, torch.cat(orders), len(parts))


def tap_parts(taps: int, splits: int) -> list[tuple[int, int]]:
    """From which tap to which each part is: as equal as they can be, none of them empty."""
    parts = max(1, min(splits, taps))
    return [(taps * s // parts, taps * (s + 1) // parts) for s in range(parts)]


def make_tap_pairs(neighbors: Tensor) -> TapPairs:
    """See :class:`TapPairs`."""
    rows, taps = neighbors.shape
    columns = neighbors.T.contiguous()
    there = (columns >= 0).flatten()
    found = there.cumsum(0)
    place = torch.where(there, found - 1, rows * taps)
    outputs = torch.arange(rows, dtype=torch.int32, device=neighbors.device).repeat(taps)
    both = torch.stack((columns.flatten(), outputs), 1)
    both = neighbors.new_zeros((rows * taps + 1, 2)).index_copy_(0, place, both)
    starts = starts_of((columns >= 0).sum(1)).to(torch.int32)
    return TapPairs(both[:, 0].contiguous(), both[:, 1].contiguous(), starts)
