"""Checkpoint formats of other projects: exact packing in both directions."""
