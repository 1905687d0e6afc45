"""Kernels and algorithms of published efficient-AI systems, grafted onto software that people already run.

>>> import kernelgraft
>>> awq = kernelgraft.load_plugin("awq")  # AWQ checkpoints now run on our kernels in Transformers
>>> awq.unload()  # and now they do not

Importing this package loads no host, no torch, and starts no CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernelgraft_core import __version__

from .errors import IncompatibleHost, InvalidOption, KernelgraftError, PatchConflict, PluginError, PluginNotFound

if TYPE_CHECKING:
    from .manager import Handle, PluginStatus

__all__ = [
    "IncompatibleHost",
    "InvalidOption",
    "KernelgraftError",
    "PatchConflict",
    "PluginError",
    "PluginNotFound",
    "__version__",
    "doctor",
    "load_plugin",
    "plugins",
    "unload_plugin",
]


def load_plugin(name: str, /, **options: Any) -> Handle:
    """Graft a plugin onto its host, and return a handle with ``info``, ``unload()`` and whatever the plugin offers.

    Loading again with the same options returns the same handle. A plugin may be grafted onto several hosts, one call
    for each. When loading fails, whatever had been changed is undone.

    Args:
        name: the plugin's name, with dashes or underscores.
        host: import name of the host to graft onto, e.g. ``"transformers"``; by default all that the plugin grafts onto
            within this process. vLLM is not among those: it loads our plugins by itself.
        options: what the plugin takes.

    Raises:
        PluginNotFound: no such plugin, or ``KERNELGRAFT_PLUGINS`` hides it.
        IncompatibleHost: a host asked for is missing or outside the tested range; it has not been touched.
        InvalidOption, ValueError: the plugin has no such host or option.
        PluginError: the plugin is broken, or already loaded with other options.
    """
    from .manager import manager

    return manager().load(name, options)


def unload_plugin(name: str) -> None:
    """Undo everything a plugin has changed, on all hosts; nothing happens when it is not loaded.

    Raises:
        PluginNotFound: no such plugin, or ``KERNELGRAFT_PLUGINS`` hides it.
        PatchConflict: somebody else has patched the same place since; the message says who has to go first. The plugin
            stays loaded, whole.
        PluginError: a plugin's own undo function failed; everything else has been undone.
    """
    from .manager import manager

    manager().unload(name)


def plugins() -> list[PluginStatus]:
    """Every installed plugin by name: what it is, its hosts as found here, what it has changed, or why it is broken.

    Imports every plugin that is not hidden by ``KERNELGRAFT_PLUGINS``, but no host.
    """
    from .manager import manager

    return manager().status()


def doctor() -> dict[str, Any]:
    """Examine this machine: versions, hosts, plugins and their checks, the backend of every op and why, GPUs, tips.

    Returns:
        Plain data that ``json.dumps`` takes; ``kernelgraft doctor`` prints it. Keys: ``kernelgraft``, ``python``,
        ``platform``, ``libraries``, ``cpu``, ``gpus``, ``c_compiler``, ``hosts``, ``plugins``, ``ops``, ``environment``
        (our variables that are set) and ``tips``. Sizes are in bytes.
    """
    from .diagnosis import examine
    from .manager import manager

    return examine(manager())
