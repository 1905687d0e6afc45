"""The door of mmengine's registries: a type ``"kernelgraft.X"`` in a config makes mmengine import this module."""

from __future__ import annotations

import importlib

from . import load_plugin

load_plugin("mmcv")  # some of what is registered builds on mmcv's ops
MODELS = importlib.import_module("kernelgraft_openmmlab.registry").MODELS
importlib.import_module("kernelgraft_openmmlab.models")
