"""QoQ: 4-bit weights, 8-bit activations, 4-bit key-value cache (QServe; Lin et al., arXiv 2405.04532)."""

from .config import QoqConfig, qoq_config
from .hadamard import hadamard
from .method import QoqMethod
from .serving import as_served

__all__ = ["QoqConfig", "QoqMethod", "as_served", "hadamard", "qoq_config"]
