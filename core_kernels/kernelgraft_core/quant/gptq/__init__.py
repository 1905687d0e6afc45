"""GPTQ (Frantar et al., arXiv 2210.17323): rounding that makes up for its own errors."""

from .solver import gptq_round, round_columns

__all__ = ["gptq_round", "round_columns"]
