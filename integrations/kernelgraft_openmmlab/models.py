"""Everything that the scope ``kernelgraft`` has, registered when this is imported."""

from __future__ import annotations

from . import flatformer as _flatformer  # noqa: F401
from .registry import MODELS
from .sparse_layers import active_sparse_module, layers_for

for _name, _layer in layers_for(active_sparse_module()).items():
    MODELS.register_module(name=_name, module=_layer)
