"""4-bit weights, 8-bit activations: the linear layer of QoQ checkpoints."""

from .ops import quantize_activation, rms_norm_quantize, silu_mul_quantize, w4a8_linear, w4a8_matmul
from .weight import W4A8Weight

__all__ = [
    "W4A8Weight",
    "quantize_activation",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "w4a8_linear",
    "w4a8_matmul",
]
