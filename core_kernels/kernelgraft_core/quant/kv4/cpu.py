"""Not fast yet: the reference."""

from __future__ import annotations

from .reference import kv4_append, kv4_attention

__all__ = ["kv4_append", "kv4_attention", "supports_kv4_append", "supports_kv4_attention"]


def supports_kv4_append(*_: object) -> None:
    return None


supports_kv4_attention = supports_kv4_append
