"""3-bit weights, 16-bit activations: the linear layer of INT3 AWQ."""

from .ops import dequantize_w3a16, w3a16_linear
from .weight import W3A16Weight

__all__ = ["W3A16Weight", "dequantize_w3a16", "w3a16_linear"]
