"""Pooling, deformable operators and losses of image models, each by the formulas of the paper that it names."""
