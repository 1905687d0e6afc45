"""What this machine has and what kernelgraft makes of it, as plain data: the body of :func:`kernelgraft.doctor`."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any

from kernelgraft_core import __version__

from . import families
from .hosts import installed_version, untested_versions
from .manager import Manager, PluginStatus

LIBRARIES = ("torch", "triton", "numba", "numpy")


def examine(manager: Manager) -> dict[str, Any]:
    """See :func:`kernelgraft.doctor`."""
    from kernelgraft_core.runtime.device import device_info

    machine = device_info()
    plugins = manager.status()
    return {
        "kernelgraft": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "cpu": {**asdict(machine.cpu), "isa": sorted(machine.cpu.isa)},
        "gpus": [{**asdict(gpu), "capability": list(gpu.capability)} for gpu in machine.gpus],
        "c_compiler": machine.c_compiler,
        "hosts": _hosts(plugins),
        "plugins": [_plugin_row(manager, plugin) for plugin in plugins],
        "ops": [row for family in families.FAMILIES for row in families.verdicts(family)],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("KERNELGRAFT_")},
        "tips": _tips(manager, has_gpu=bool(machine.gpus), compiler=machine.c_compiler),
    }


def broken_plugins(report: dict[str, Any]) -> list[str]:
    """Names of plugins that cannot be used or whose own checks fail."""
    return [
        plugin["name"]
        for plugin in report["plugins"]
        if plugin["error"] or not all(check["ok"] for check in plugin["checks"])
    ]


def _hosts(plugins: list[PluginStatus]) -> list[dict[str, Any]]:
    """Each host once per range: two plugins may ask for different ones."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for plugin in plugins:
        for host in plugin.hosts:
            row = rows.setdefault((host.module, host.specifier), {**asdict(host), "ok": host.ok, "plugins": []})
            row["plugins"].append(plugin.name)
    return [rows[key] for key in sorted(rows)]


def _plugin_row(manager: Manager, plugin: PluginStatus) -> dict[str, Any]:
    checks = [] if plugin.error else [asdict(check) for check in manager.examine(plugin.name)]
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "hosts": [host.module for host in plugin.hosts],
        "loaded": list(plugin.loaded),
        "patches": list(plugin.patches),
        "error": plugin.error,
        "checks": checks,
    }


def _tips(manager: Manager, *, has_gpu: bool, compiler: str | None) -> list[str]:
    tips = untested_versions()
    if installed_version("numba") is None:
        tips.append(
            "numba is missing: the CPU kernels written in it fall back to slower torch code; "
            "pip install 'kernelgraft[cpu]'"
        )
    if not has_gpu and platform.system() == "Linux":
        tips.append(
            "on CPU, start Python and vLLM with THP_MEM_ALLOC_ENABLE=1: torch then takes huge pages for large buffers, "
            "which memory-bound kernels gain 2x and more from; the kernelgraft command sets it itself"
        )
    if has_gpu and compiler is None:
        tips.append("no C compiler found: Triton needs one to launch kernels; install gcc or set CC")
    if has_gpu and installed_version("triton") is None:
        tips.append("Triton is missing: nothing but the reference runs on the GPU; pip install triton")
    for name in manager.unknown_names():
        tips.append(f"KERNELGRAFT_PLUGINS names {name!r}, which is not installed")
    return tips
