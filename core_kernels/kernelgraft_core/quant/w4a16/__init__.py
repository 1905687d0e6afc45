"""4-bit weights, 16-bit activations: the linear layer AWQ and GPTQ checkpoints need."""

from .ops import dequantize_w4a16, w4a16_linear
from .weight import W4A16Weight

__all__ = ["W4A16Weight", "dequantize_w4a16", "w4a16_linear"]
