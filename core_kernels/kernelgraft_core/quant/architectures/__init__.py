"""Where the linear layers of a decoder sit: all that a quantizer has to know about a model family.

Names are those of ``torch.nn`` submodules, so nothing here imports a host. How to add a family is described in
docs/quantization/architectures.md.
"""

from .adapter import Architecture, ScaleGroup, Source, linear_layer
from .folding import fold
from .registry import ARCHITECTURES, find_architecture, register_architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ScaleGroup",
    "Source",
    "find_architecture",
    "fold",
    "linear_layer",
    "register_architecture",
]
