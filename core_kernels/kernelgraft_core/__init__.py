"""Kernels and algorithms of kernelgraft. Knows no host and no plugin; importing it loads neither torch nor Triton."""

__version__ = "0.1.0"
