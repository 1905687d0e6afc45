"""Multi-scale deformable attention."""

from .ops import deform_attention

__all__ = ["deform_attention"]
