"""Activation-aware weight quantization (AWQ; Lin et al., arXiv 2306.00978)."""

from .algorithm import AwqConfig, AwqMethod, quantize_awq, rtn_config

__all__ = ["AwqConfig", "AwqMethod", "quantize_awq", "rtn_config"]
