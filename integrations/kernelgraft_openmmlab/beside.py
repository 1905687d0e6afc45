"""A file beside mmcv-lite that leads ``import mmcv._ext`` to kernelgraft, for programs that cannot be changed.

It carries a hash of itself: a file that somebody else made, or changed, is never replaced or removed.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_HEAD = "# Made by `kernelgraft mmcv enable`, taken away by `kernelgraft mmcv disable`. sha256 of the lines below: "
_BODY = '''"""Leads mmcv to kernelgraft, which provides its compiled ops."""

import sys

import kernelgraft.mmcv

sys.modules[__name__] = kernelgraft.mmcv.extension()
'''


@dataclass(frozen=True)
class Status:
    """What stands beside mmcv.

    Attributes:
        folder: of mmcv; path: of the file.
        state: ``"enabled"``, ``"disabled"``, ``"foreign"`` (a file of that name which is not ours) or ``"compiled"``.
        found: the foreign or compiled module.
    """

    folder: Path
    path: Path
    state: str
    found: Path | None = None


def status() -> Status:
    """How ``mmcv._ext`` would be found by a program that knows nothing of kernelgraft.

    Raises:
        FileNotFoundError: mmcv is not installed.
    """
    spec = importlib.util.find_spec("mmcv")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("mmcv is not installed: pip install mmcv-lite==2.1.0")
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / "_ext.py"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (compiled := folder / f"_ext{suffix}").exists():
            return Status(folder, path, "compiled", compiled)
    if not path.exists():
        return Status(folder, path, "disabled")
    return Status(folder, path, "enabled") if is_ours(path) else Status(folder, path, "foreign", path)


def enable() -> Status:
    """Put the file there; it stays as it is when it is there.

    Raises:
        FileNotFoundError: mmcv is not installed.
        FileExistsError: a compiled mmcv or a foreign file has that name.
        OSError: the file cannot be written.
    """
    now = status()
    if now.state == "compiled":
        raise FileExistsError(
            f"mmcv is compiled: {now.found} provides its ops, and a file beside it would never be read; "
            "import kernelgraft.mmcv first, which fills in what it lacks"
        )
    if now.state == "foreign":
        raise FileExistsError(f"{now.path} was not made by kernelgraft, or was changed since: it is left alone")
    if now.state == "disabled":
        handle, temporary = tempfile.mkstemp(dir=now.folder, prefix="._ext-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(_text())
            os.chmod(temporary, 0o644)
            os.replace(temporary, now.path)
        except BaseException:
            os.unlink(temporary)
            raise
    return status()


def disable() -> bool:
    """Take the file away; whether there was one.

    Raises:
        FileNotFoundError: mmcv is not installed.
        FileExistsError: the file is not ours.
    """
    now = status()
    if not now.path.exists():
        return False
    if not is_ours(now.path):
        raise FileExistsError(f"{now.path} was not made by kernelgraft, or was changed since: it is left alone")
    now.path.unlink()
    cached = Path(importlib.util.cache_from_source(str(now.path)))
    cached.unlink(missing_ok=True)
    return True


def is_ours(path: str | Path) -> bool:
    """Whether a file was made here and is unchanged."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_HEAD)) != _HEAD.encode():  # of a compiled module no more is read
                return False
            text = file.read().decode()
    except (OSError, UnicodeDecodeError):
        return False
    first, _, rest = text.partition("\n")
    return first == _hash(rest)


def _text() -> str:
    return f"{_HEAD}{_hash(_BODY)}\n{_BODY}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
