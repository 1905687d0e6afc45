"""The door of OpenMMLab's configs: ``custom_imports = dict(imports=["kernelgraft.openmmlab"])``.

mmcv's ops, and ``SubMConv3d``, ``SparseConv3d`` and their kin, are then kernelgraft's; so are types
``"kernelgraft.X"``. The programs in ``tools/`` import mmcv's ops before they read a config: without a compiled mmcv
start them by ``python -m kernelgraft.run``, or import :mod:`kernelgraft.mmcv` first.
"""

from __future__ import annotations

from . import load_plugin

load_plugin("mmcv")
load_plugin("sparse-conv", host="mmcv")
