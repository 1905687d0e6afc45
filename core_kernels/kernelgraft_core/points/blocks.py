"""Points of several clouds in the order of a space-filling curve, cut into blocks whose boxes tell what is far away.

What searches for near points on a CPU looks at boxes first. A distance to a box is computed by the same operations, in
the same order, as one to a point; rounding is monotonic, so that it is never above that of a point inside, to the last
bit, and what is skipped could not have mattered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase

BLOCK = 64  # points


@dataclass(frozen=True)
class PointBlocks:
    """N points of B clouds, cloud by cloud, in blocks of 64; a block holds points of one cloud.

    Attributes:
        starts: int64 ``(B + 1,)``: where each cloud begins among the points.
        block_starts: int64 ``(B + 1,)``: where each cloud begins among the blocks.
        order: int32 ``(N,)``: the number of each point in its cloud.
        places: float32 ``(3, N)``: x, y and z in that order.
        boxes: float32 ``(6, blocks)``: lower x, y, z and upper x, y, z. NaN is in no box.
    """

    starts: Tensor
    block_starts: Tensor
    order: Tensor
    places: Tensor
    boxes: Tensor

    @classmethod
    def of(cls, points: Tensor, starts: Tensor) -> PointBlocks:
        """Sort float32 points ``(N, 3)`` of clouds that begin at ``starts``, which ascend from 0 to N."""
        from kernelgraft_core.sparse.maps import cpu_kernels as sorting

        from . import block_kernels as kernels

        points, starts = points.contiguous(), starts.contiguous()
        rows, clouds = len(points), len(starts) - 1
        per_cloud = (starts.diff() + BLOCK - 1) // BLOCK
        block_starts = torch.cat((per_cloud.new_zeros(1), per_cloud.cumsum(0)))
        keys, rank, spare_keys, spare_rank = torch.empty((4, rows), dtype=torch.int64)
        order = torch.empty(rows, dtype=torch.int32)
        places, boxes = torch.empty((3, rows)), torch.empty((6, int(block_starts[-1])))
        if rows:
            Launch(Phase(kernels.curve_keys.address, clouds))(
                points.data_ptr(), rows, starts.data_ptr(), clouds, keys.data_ptr()
            )
            Launch(Phase(sorting.sort_keys.address, 1))(
                0, rows, 0, 0, 0, rank.data_ptr(), keys.data_ptr(), spare_keys.data_ptr(), spare_rank.data_ptr(),
                (clouds << kernels.KEY_BITS) - 1,
            )  # fmt: skip
            Launch(Phase(kernels.make_blocks.address, clouds))(
                points.data_ptr(), rows, starts.data_ptr(), clouds, rank.data_ptr(), block_starts.data_ptr(),
                boxes.shape[1], order.data_ptr(), places.data_ptr(), boxes.data_ptr(), BLOCK,
            )  # fmt: skip
        return cls(starts, block_starts, order, places, boxes)
