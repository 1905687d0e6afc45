"""FlatFormer (arXiv 2301.08739): a transformer on pillars that attends in groups of equal size.

Names of parameters are those of the original's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention.ops import grouped_self_attention
from .groups import Groups, group_points
from .keys import Key, WindowKey
from .norm_ffn.ops import norm_ffn

TEMPERATURE = 10_000.0
LARGEST_TABLE = 1 << 12  # cells along a side, up to which there are fewer of them than rows, most of the time


class _Projections(nn.Module):
    """The parameters of multi-head attention, named as in ``torch.nn.MultiheadAttention``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class GroupAttention(nn.Module):
    """Multi-head self-attention in groups; queries and keys know where they are.

    Args:
        channels: a multiple of ``num_heads``.

    Raises:
        ValueError: channels do not split into heads.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or channels < 1 or channels % num_heads:
            raise ValueError(f"{channels} channels do not split into {num_heads} heads")
        self.num_heads = num_heads
        self.attn = _Projections(channels)

    def forward(self, x: Tensor, position: Tensor | None, groups: Groups) -> Tensor:
        attn = self.attn
        return grouped_self_attention(
            x, position, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias, groups,
            self.num_heads,
        )  # fmt: skip


class FlatFormerLayer(nn.Module):
    """Attention in groups and a feed-forward network, each followed by a normalization.

    ``h = LN1(x + attention(x)); y = LN2(h + fc2(gelu(fc1(h))))``
    """

    def __init__(self, channels: int, num_heads: int = 8, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * channels if hidden is None else hidden
        self.attn = GroupAttention(channels, num_heads)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor | None, groups: Groups) -> Tensor:
        """``x``, ``position``: ``(N, C)``; returns ``(N, C)`` in the same order of rows."""
        update = self.attn(x, position, groups)
        norm1, fc1, fc2, norm2 = self.norm1, self.fc1, self.fc2, self.norm2
        return norm_ffn(
            x, update, norm1.weight, norm1.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm2.weight, norm2.bias,
            norm1.eps,
        )  # fmt: skip


class FlatFormerBlock(nn.Module):
    """One layer for each way to group the rows."""

    def __init__(self, channels: int, num_heads: int = 8, layers: int = 4, hidden: int | None = None) -> None:
        super().__init__()
        self.block = nn.ModuleList(FlatFormerLayer(channels, num_heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor, position: Tensor | None, groups: Sequence[Groups]) -> Tensor:
        """``groups``: one for each layer."""
        for layer, each in zip(self.block, groups, strict=True):
            x = layer(x, position, each)
        return x


class FlatFormer(nn.Module):
    """Blocks of layers over pillars: windows by rows, the same shifted, windows by columns, the same shifted.

    Args:
        in_channels: C, a multiple of 4.
        num_heads: C is a multiple of it.
        num_blocks: of four layers each.
        grid_shape: ``(size_x, size_y, size_z)`` in cells.
        window_shape: cells along (x, y, z) of a window. The released models use ``(13, 13, 1)`` and groups of 144.
        group_size: the most rows that attend to each other.
        hidden: channels inside the feed-forward network, ``2 * in_channels`` unless given.
        parity: fill up the last group of a sample as the original does, which its weights were trained with; see
            :data:`~kernelgraft_core.point_attention.groups.TAILS`.
        keys: one way to order rows for each layer of a block, instead of the four windows: see
            :mod:`~kernelgraft_core.point_attention.keys`.

    Raises:
        ValueError: a size is not positive, or channels do not split.
    """

    def __init__(
        self,
        in_channels: int = 128,
        num_heads: int = 8,
        num_blocks: int = 2,
        grid_shape: Sequence[int] = (468, 468, 1),
        window_shape: Sequence[int] = (9, 9, 1),
        group_size: int = 69,
        hidden: int | None = None,
        parity: bool = False,
        keys: Sequence[Key] | None = None,
    ) -> None:
        super().__init__()
        if in_channels % 4:
            raise ValueError(f"in_channels is {in_channels}, expected a multiple of 4: sines and cosines of x and y")
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}, expected at least 1")
        if not (len(window_shape) == len(grid_shape) == 3 and min(*window_shape, *grid_shape) > 0):
            raise ValueError(f"window_shape is {window_shape}, grid_shape {grid_shape}, expected three sizes (x, y, z)")
        if num_blocks < 1 or (hidden is not None and hidden < 1) or (keys is not None and not keys):
            raise ValueError(f"num_blocks is {num_blocks}, hidden {hidden}, keys {keys}, expected at least 1 of each")
        wide, high, deep = window_shape
        if keys is None:
            keys = [WindowKey((wide, high, deep), axis, shifted) for axis in ("x", "y") for shifted in (False, True)]
        self.keys = tuple(keys)
        self._first = [self.keys.index(key) for key in self.keys]  # of the layers that share a key
        self.grid_shape, self.group_size, self.parity = tuple(grid_shape), group_size, parity
        self.block_list = nn.ModuleList(
            FlatFormerBlock(in_channels, num_heads, len(self.keys), hidden) for _ in range(num_blocks)
        )

    def forward(self, feats: Tensor, coords: Tensor, batch_size: int) -> Tensor:
        """Features after all blocks.

        Args:
            feats: ``(N, C)`` of pillars in any order.
            coords: int32 ``(N, 4)``, rows (sample, z, y, x).
            batch_size: how many samples; some may have no rows.

        Returns:
            ``(N, C)`` in the order of the rows of ``feats``. What a sample gets does not depend on the others.

        Raises:
            ValueError: shapes do not fit, or coordinates lie outside the grid or the batch.
        """
        if feats.dim() != 2 or coords.shape[0] != feats.shape[0]:
            raise ValueError(f"feats is {tuple(feats.shape)}, coords {tuple(coords.shape)}, expected (N, C) and (N, 4)")
        tail = "parity" if self.parity else "balanced"
        # A key that two layers share is sorted by once; all blocks share the groups.
        grid, size = self.grid_shape, self.group_size
        made = {i: group_points(coords, grid, batch_size, self.keys[i], size, tail) for i in sorted(set(self._first))}
        groups = [made[i] for i in self._first]
        position = sine_position(coords, feats.shape[1], self.grid_shape).to(feats.dtype)
        for block in self.block_list:
            feats = block(feats, position, groups)
        return feats


def sine_position(coords: Tensor, channels: int, grid_shape: Sequence[int]) -> Tensor:
    """Sines and cosines of x in the first half of the channels, of y in the second: float32 ``(N, channels)``.

    Channels ``2 i`` and ``2 i + 1`` of a half are the sine and cosine of ``x / 10000^(2 i / (channels / 2))``.

    Args:
        coords: ``(N, 4)`` rows (sample, z, y, x) within ``grid_shape``, which is ``(size_x, size_y, size_z)``.
        channels: a multiple of 4.
    """
    device, half = coords.device, channels // 2
    steps = TEMPERATURE ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)

    def waves(places: Tensor) -> Tensor:
        angles = places.float().unsqueeze(-1) * steps
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)

    if max(grid_shape[:2]) > LARGEST_TABLE:
        return waves(coords[:, 2:].flip(1)).flatten(1)
    return waves(torch.arange(max(grid_shape[:2]), device=device))[coords[:, 2:].long().flip(1)].flatten(1)
