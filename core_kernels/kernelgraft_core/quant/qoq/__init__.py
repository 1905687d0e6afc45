"""QoQ: 4-bit weights, 8-bit activations, 4-bit key-value cache (QServe; Lin et al., arXiv 2405.04532)."""

from .hadamard import hadamard
from .method import QoqConfig, QoqMethod

__all__ = ["QoqConfig", "QoqMethod", "hadamard"]
