"""The registry scope ``kernelgraft``: types such as ``"kernelgraft.FlatFormer"`` in any OpenMMLab config."""

from __future__ import annotations

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

# Without locations: the door, kernelgraft/registry.py, imports what is registered, after mmcv's ops can be imported.
MODELS = Registry("model", parent=ROOT, scope="kernelgraft")
