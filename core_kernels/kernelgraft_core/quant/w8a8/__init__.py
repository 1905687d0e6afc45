"""8-bit weights with a scale per row, 8-bit activations: what W4A8 expands to, and SmoothQuant's linear layer."""

from .ops import w8a8_linear, w8a8_matmul

__all__ = ["w8a8_linear", "w8a8_matmul"]
