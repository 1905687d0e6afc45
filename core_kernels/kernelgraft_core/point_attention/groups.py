"""Rows in an order cut into groups of about equal size, none of which crosses a sample.

FlatFormer (arXiv 2301.08739) attends in groups of equal size rather than in windows, so that no work is spent on
padding. What is left at the end of a sample is dealt with by one of three rules, see :data:`TAILS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .keys import GridShape, Key, order_rows

TAILS = ("balanced", "overlap", "parity")
"""What becomes of a sample of ``n`` rows, with ``G = group_size``:

* ``balanced``: ``ceil(n / G)`` groups whose sizes differ by at most one. Every row is in one group.
* ``overlap``: groups of G; the last one is filled up with the rows before it, which attend in their own group only, and
  is short where the sample is. As in PointTransformer V3.
* ``parity``: the same, but a sample of fewer than G rows is filled up with itself, over and over. As FlatFormer was
  trained; its weights want it.
"""


@dataclass(frozen=True)
class Groups:
    """Which rows attend to which.

    Attributes:
        members: int32 ``(S,)`` rows, group after group. In a group its own rows come first, then those it borrows.
        starts: int32 ``(g + 1,)``: group ``i`` is ``members[starts[i]:starts[i + 1]]``. There may be empty groups, and
            members behind the last start, so that sizes are known without waiting for a GPU.
        owned: int32 ``(g,)``: how many members of each group are its own. Every row is owned once.
        rows: N.
        size: no group has more members.
    """

    members: Tensor
    starts: Tensor
    owned: Tensor
    rows: int
    size: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the ops take them."""
        return self.members, self.starts, self.owned

    def to(self, device: torch.device | str) -> Groups:
        """The same on another device."""
        members, starts, owned = (each.to(device) for each in self.tensors)
        return Groups(members, starts, owned, self.rows, self.size)


def group_points(
    coords: Tensor, grid_shape: GridShape, batch_size: int, key: Key, group_size: int, tail: str = "balanced"
) -> Groups:
    """Order rows of coordinates by a key and cut them into groups.

    Args:
        coords: int32 or int64 ``(N, 4)``, rows (sample, z, y, x) in any order.
        grid_shape: ``(size_x, size_y, size_z)``.
        key: see :mod:`.keys`.
        group_size: the most rows of a group.
        tail: one of :data:`TAILS`.

    Raises:
        ValueError: an argument is wrong; see also :func:`~.keys.batch_key`.
    """
    order, bounds = order_rows(key, coords, grid_shape, batch_size)
    return cut(order, bounds, group_size, tail)


def cut(order: Tensor, bounds: Tensor, group_size: int, tail: str = "balanced") -> Groups:
    """Cut runs of ordered rows into groups that cross none of their bounds.

    Args:
        order: int64 ``(N,)``, a permutation of the rows.
        bounds: int64 ``(B + 1,)`` ascending from 0 to N: where runs begin. A run is a sample; or, say, a window, which
            gives the sets of DSVT.
        group_size, tail: as for :func:`group_points`.

    Raises:
        ValueError: group_size is not positive, or tail is unknown.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}, expected at least 1")
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}, expected one of {TAILS}")
    rows, runs, device = order.shape[0], bounds.shape[0] - 1, order.device
    counts = bounds.diff()
    groups = -(-counts // group_size)  # of each run
    before = torch.cat((groups.new_zeros(1), groups.cumsum(0)))
    limit = rows // group_size + torch.sym_min(runs, rows)  # no run has more than one group that is not full
    number = torch.arange(limit + 1, device=device)
    run = (torch.searchsorted(before, number, right=True) - 1).clamp(0, max(0, runs - 1))
    if not (rows and runs):
        none = torch.zeros(limit + 1, dtype=torch.int32, device=device)
        return Groups(order.to(torch.int32), none, none[:-1], rows, group_size)
    there = number < before[-1]
    within = number - before[run]
    if tail == "balanced":
        first = bounds[run] + within * counts[run] // groups[run].clamp(min=1)
        starts = torch.where(there, first, rows).to(torch.int32)
        return Groups(order.to(torch.int32), starts, starts.diff(), rows, torch.sym_min(group_size, rows))
    # Members of all groups, group_size places for each; what a group lacks is borrowed.
    owned = torch.where(there, (counts[run] - within * group_size).clamp(max=group_size), 0)[:-1]
    filled = torch.where(counts[run] >= group_size, group_size, counts[run] if tail == "overlap" else group_size)
    lengths = torch.where(there, filled, 0)[:-1]
    ends = lengths.cumsum(0)
    place = torch.arange(limit * group_size, device=device)
    # Where all are full, a place tells its group; else those behind the last group get the last one's number.
    group = (
        place // group_size if tail == "parity" else torch.searchsorted(ends, place, right=True).clamp(max=limit - 1)
    )
    inside = place - (ends - lengths)[group]
    own = within[group] * group_size + inside  # in its run
    length = counts[run[group]]
    short = length < group_size
    borrowed = torch.where(short, own % length.clamp(min=1), own - group_size)
    source = bounds[run[group]] + torch.where(inside < owned[group], own, borrowed)
    # Places behind the last group are nobody's: any row will do.
    source = torch.where(place < ends[-1], source, 0)
    starts = torch.cat((ends.new_zeros(1), ends))
    return Groups(order[source].to(torch.int32), starts.to(torch.int32), owned.to(torch.int32), rows, group_size)
