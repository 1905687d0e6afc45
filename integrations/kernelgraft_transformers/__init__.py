"""Hugging Face Transformers: loading quantized checkpoints on kernelgraft's kernels, and making them."""
