"""``import kernelgraft.mmcv`` before mmcv: its ops then need no compiled module.

>>> import kernelgraft.mmcv
>>> from mmdet3d.apis import init_model, inference_detector

It loads the plugin ``mmcv``; :func:`kernelgraft.unload_plugin` takes that off again.
"""

from __future__ import annotations

from types import ModuleType

from . import load_plugin

load_plugin("mmcv")


def extension() -> ModuleType:
    """The module that answers to ``mmcv._ext``; for the file that ``kernelgraft mmcv enable`` puts beside mmcv."""
    from kernelgraft_openmmlab.ext import extension as made

    return made()
