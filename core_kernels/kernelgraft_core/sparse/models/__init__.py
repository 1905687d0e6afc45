"""Networks that people train on point clouds, ready made."""

from .encoder import SparseEncoder, centerpoint_encoder, second_encoder
from .minkunet import MinkUNet

__all__ = ["MinkUNet", "SparseEncoder", "centerpoint_encoder", "second_encoder"]
