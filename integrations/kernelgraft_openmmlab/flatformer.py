"""FlatFormer (arXiv 2301.08739) as a middle encoder of mmdet3d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor

from kernelgraft_core.point_attention import FlatFormer as Blocks
from kernelgraft_core.point_attention import HilbertKey, Key, ZOrderKey, to_bev

from .registry import MODELS

ORDERS: dict[str, type[Any] | None] = {"window": None, "z-order": ZOrderKey, "hilbert": HilbertKey}
OUTPUTS = ("bev", "rows")


@MODELS.register_module()
class FlatFormer(Blocks, BaseModule):
    """Features of pillars in, a picture seen from above out: ``type="kernelgraft.FlatFormer"``.

    It stands where ``PointPillarsScatter`` does, in the slot ``middle_encoder`` or ``pts_middle_encoder``. Parameters
    have the names of the original's checkpoints.

    Args:
        in_channels: C, of the voxel encoder; a multiple of 4 and of ``num_heads``.
        grid_shape: ``(size_x, size_y, size_z)``: the point cloud range over the voxel size.
        window_shape, group_size, num_heads, num_blocks, hidden, parity: as
            :class:`kernelgraft_core.point_attention.FlatFormer` takes them. The released models have windows of
            ``(13, 13, 1)`` and groups of 144.
        order: ``"window"``, FlatFormer's windows by rows and by columns; or ``"z-order"`` or ``"hilbert"``, curves
            through the whole grid, the same one in all layers.
        output: ``"bev"``: ``(B, C, size_y, size_x)``; ``"rows"``: features and coordinates as they came.
        init_cfg: of mmengine.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int = 128,
        grid_shape: Sequence[int] = (468, 468, 1),
        window_shape: Sequence[int] = (9, 9, 1),
        group_size: int = 69,
        num_heads: int = 8,
        num_blocks: int = 2,
        hidden: int | None = None,
        parity: bool = False,
        order: str = "window",
        output: str = "bev",
        init_cfg: Any = None,
    ) -> None:
        if order not in ORDERS or output not in OUTPUTS:
            raise ValueError(
                f"order is {order!r} and output {output!r}, expected one of {', '.join(ORDERS)} and one of "
                f"{', '.join(OUTPUTS)}"
            )
        if output == "bev" and grid_shape[2] != 1:
            raise ValueError(f"grid_shape is {tuple(grid_shape)}: a picture has one place for all z; set output='rows'")
        key = ORDERS[order]
        keys: list[Key] | None = None if key is None else [key()] * 4
        super().__init__(in_channels, num_heads, num_blocks, grid_shape, window_shape, group_size, hidden, parity, keys)
        self.init_cfg, self.output = init_cfg, output

    def forward(  # type: ignore[override]  # what mmdet3d's slot gives and takes
        self, voxel_features: Tensor, coors: Tensor, batch_size: int | Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A picture, or features and coordinates.

        Args:
            voxel_features: ``(N, C)``.
            coors: integer ``(N, 4)``, rows (sample, z, y, x); at most one row for each place seen from above where the
                output is a picture.
            batch_size: how many samples.

        Raises:
            ValueError: shapes do not fit, or a coordinate lies outside the grid or the batch.
        """
        count = int(batch_size)
        features = super().forward(voxel_features, coors.int(), count)
        if self.output == "rows":
            return features, coors
        size_x, size_y, _ = self.grid_shape
        return to_bev(features, coors, count, (size_y, size_x))
