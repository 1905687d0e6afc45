"""Everything kernelgraft raises about plugins; all of it derives from :class:`KernelgraftError`."""

from __future__ import annotations

from kernelgraft_core.runtime.errors import KernelgraftError

__all__ = ["IncompatibleHost", "InvalidOption", "KernelgraftError", "PatchConflict", "PluginError", "PluginNotFound"]


class PluginNotFound(KernelgraftError, LookupError):
    """No installed plugin has that name, or ``KERNELGRAFT_PLUGINS`` hides it; the message lists the known ones."""


class PluginError(KernelgraftError, RuntimeError):
    """A plugin is broken or in the wrong state; the message names its distribution, the cause is chained."""


class InvalidOption(KernelgraftError, ValueError):
    """``load_plugin`` was given an option or a host that the plugin does not offer."""


class IncompatibleHost(KernelgraftError, RuntimeError):
    """A host is missing or outside the tested range; the message gives the range and the version found."""


class PatchConflict(KernelgraftError, RuntimeError):
    """A change cannot be undone because its place has been changed again since; the message says by whom.

    Nothing has been undone when this is raised: the plugin is still loaded, whole, and can be unloaded later.
    """
