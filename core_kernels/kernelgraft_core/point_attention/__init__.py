"""Attention on points: rows ordered by a key, cut into groups, attending within them."""

from .attention.ops import grouped_attention, grouped_self_attention
from .bev import to_bev
from .groups import TAILS, Groups, cut, group_points
from .keys import HilbertKey, Key, WindowKey, ZOrderKey, batch_key, order_rows
from .nn import FlatFormer, FlatFormerBlock, FlatFormerLayer, GroupAttention, sine_position
from .norm_ffn.ops import norm_ffn

__all__ = [
    "TAILS",
    "FlatFormer",
    "FlatFormerBlock",
    "FlatFormerLayer",
    "GroupAttention",
    "Groups",
    "HilbertKey",
    "Key",
    "WindowKey",
    "ZOrderKey",
    "batch_key",
    "cut",
    "group_points",
    "grouped_attention",
    "grouped_self_attention",
    "norm_ffn",
    "order_rows",
    "sine_position",
    "to_bev",
]
