"""The key-value cache in 4 bits."""

from .numbers import dequantize_kv, quantize_kv

__all__ = ["dequantize_kv", "quantize_kv"]
