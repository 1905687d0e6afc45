"""The plugins of this distribution: one thin file each, found through entry points like anybody else's."""

from __future__ import annotations

import sys
from collections.abc import Callable

PLUGIN_OF_METHOD = {"awq": "awq", "kernelgraft_awq": "awq", "qoq": "qoq"}
"""Which of them loads a checkpoint into Transformers, by its ``quant_method``."""


def close_door(module: str) -> Callable[[], None]:
    """What forgets a module whose import loads a plugin, so that its next import loads it again."""

    def close() -> None:
        sys.modules.pop(module, None)

    return close
