"""The door of mmengine's registries: a type ``"kernelgraft.X"`` in a config makes mmengine import this module."""

from __future__ import annotations

import importlib
from typing import Any

from . import load_plugin


def _open() -> Any:
    load_plugin("mmcv")  # some of what is registered builds on mmcv's ops
    importlib.import_module("kernelgraft_openmmlab.models")
    return importlib.import_module("kernelgraft_openmmlab.registry").MODELS


MODELS = _open()
