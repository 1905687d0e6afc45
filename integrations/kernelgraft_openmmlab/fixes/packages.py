"""mmengine 0.10 asks ``pkg_resources`` where packages are, which setuptools 82 has dropped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kernelgraft_core.runtime.patching import Patches

from .rebinding import replace_everywhere


def _repair(patches: Patches, module: ModuleType) -> None:
    if importlib.util.find_spec("pkg_resources") is not None:
        return
    for function in (is_installed, get_installed_path, package2module):
        replace_everywhere(patches, module, function.__name__, _by(function))


def _by(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda _: function


def is_installed(package: str) -> bool:
    """Whether there is a distribution or a module of that name."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def get_installed_path(package: str) -> str:
    """The folder of a package, by the name of its module or of its distribution.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
        RuntimeError: it is a namespace package, which has no folder of its own.
    """
    spec = importlib.util.find_spec(package) or importlib.util.find_spec(package2module(package))
    if spec is None:
        raise importlib.metadata.PackageNotFoundError(package)
    if spec.origin is None:
        raise RuntimeError(f"{package} is a namespace package: it has no folder of its own")
    return str(Path(spec.origin).parent)


def package2module(package: str) -> str:
    """The first top-level module of a distribution.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
        ValueError: it does not say.
    """
    listed = importlib.metadata.distribution(package).read_text("top_level.txt")
    if not listed or not listed.split():
        raise ValueError(f"cannot infer the module of distribution {package}: it has no top_level.txt")
    return listed.split()[0]


REPAIRS = {"mmengine.utils.package_utils": _repair}
