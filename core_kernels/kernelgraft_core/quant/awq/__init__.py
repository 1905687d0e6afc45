"""Activation-aware weight quantization (AWQ; Lin et al., arXiv 2306.00978)."""

from .algorithm import AwqConfig, AwqMethod, awq_gptq_config, gptq_config, quantize_awq, rtn_config

__all__ = ["AwqConfig", "AwqMethod", "awq_gptq_config", "gptq_config", "quantize_awq", "rtn_config"]
