"""The plugins of this distribution: one thin file each, found through entry points like anybody else's."""

PLUGIN_OF_METHOD = {"awq": "awq", "kernelgraft_awq": "awq", "qoq": "qoq"}
"""Which of them loads a checkpoint into Transformers, by its ``quant_method``."""
