"""A paged key-value cache in 4 bits (KV4 of QServe, arXiv 2405.04532), and attention over it."""

from .numbers import dequantize_kv, quantize_kv
from .ops import kv4_append, kv4_attention
from .rows import kv4_row_bytes, new_cache, pack_rows, unpack_rows

__all__ = [
    "dequantize_kv",
    "kv4_append",
    "kv4_attention",
    "kv4_row_bytes",
    "new_cache",
    "pack_rows",
    "quantize_kv",
    "unpack_rows",
]
