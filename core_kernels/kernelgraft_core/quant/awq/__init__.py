"""Activation-aware weight quantization (AWQ; Lin et al., arXiv 2306.00978)."""

from .algorithm import AwqConfig, BlockResult, LayerReport, quantize_awq

__all__ = ["AwqConfig", "BlockResult", "LayerReport", "quantize_awq"]
