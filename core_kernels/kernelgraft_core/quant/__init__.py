"""Quantized formats, the kernels that run them and the algorithms that produce them."""
