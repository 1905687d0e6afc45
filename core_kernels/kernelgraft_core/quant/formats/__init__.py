"""Checkpoint formats: exact packing in both directions, one description per format."""
