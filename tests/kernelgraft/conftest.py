"""Hosts and plugins that exist for one test: distributions in a folder of their own at the front of sys.path."""

import importlib
import sys
from pathlib import Path

import pytest

from kernelgraft import manager as manager_module


class Site:
    """A folder that Python imports from and finds distributions in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def module(self, name: str, source: str = "") -> None:
        (self.folder / f"{name}.py").write_text(source)
        self.modules.append(name)
        importlib.invalidate_caches()

    def distribution(self, name: str, version: str = "1.0", plugins: dict[str, str] | None = None) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = "".join(f"{plugin} = {module}\n" for plugin, module in (plugins or {}).items())
        (info / "entry_points.txt").write_text(f"[kernelgraft]\n{points}" if points else "")
        importlib.invalidate_caches()

    def host(self, name: str, version: str, source: str = "VALUE = 'original'\n") -> None:
        self.distribution(name, version)
        self.module(name, source)

    def plugin(self, name: str, source: str) -> None:
        """A plugin from a distribution ``<name>-dist``; the hooks' names are there already."""
        module = f"plugin_{name.replace('-', '_')}"
        header = "from kernelgraft.hookspecs import Check, HostRequirement, Kernel, PluginInfo, hookimpl\n"
        self.module(module, header + source)
        self.distribution(f"{name}-dist", plugins={name: module})


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("KERNELGRAFT_PLUGINS", raising=False)
    made = Site(folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


@pytest.fixture
def fresh_manager():
    """The process's manager is made anew in this test, and again after it."""
    manager_module._made.cache_clear()
    yield
    manager_module._made.cache_clear()
