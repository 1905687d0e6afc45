"""Find plugins, load them one at a time, and take them off again."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, Self

import pluggy

from . import hookspecs
from .errors import InvalidOption, KernelgraftError, PluginError, PluginNotFound
from .hookspecs import Check, HostRequirement, Kernel, PluginInfo
from .hosts import HostStatus, inspect_host, require_host, warn_about_untested_versions
from .patches import PatchSet

log = logging.getLogger("kernelgraft")

GROUP = "kernelgraft"
"""Entry-point group in which plugins are found."""
OWN_DISTRIBUTION = "kernelgraft"


class Handle:
    """A loaded plugin. Attributes other than these are those of the object the plugin offers, if it offers one.

    Also a context manager that unloads at the end of the block.

    Attributes:
        info: what the plugin is.
        hosts: the import names of the hosts it was grafted onto.
    """

    def __init__(self, manager: Manager, info: PluginInfo, hosts: tuple[str, ...]) -> None:
        self.info = info
        self.hosts = hosts
        self._manager = manager
        self._offered: object = None

    def unload(self) -> None:
        """Undo this graft; nothing happens when that was done already. Raises as :func:`kernelgraft.unload_plugin`."""
        self._manager.unload_graft(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._offered is None:
            raise AttributeError(f"plugin {self.info.name!r} offers no {name!r}")
        return getattr(self._offered, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def __repr__(self) -> str:
        return f"<kernelgraft plugin {self.info.name!r} on {', '.join(self.hosts) or 'no host'}>"


@dataclass(frozen=True)
class PluginStatus:
    """One row of :func:`kernelgraft.plugins`.

    Attributes:
        name, distribution: the entry point's name and the distribution it comes from.
        info: what the plugin says of itself, None when it is broken.
        hosts: each host as found on this machine.
        loaded: the hosts it is grafted onto now, one entry per graft: ``("transformers",)``, or ``("-",)`` when it only
            brings kernels.
        patches: what is changed now.
        error: why the plugin cannot be used, None when it can.
    """

    name: str
    distribution: str
    info: PluginInfo | None
    hosts: tuple[HostStatus, ...]
    loaded: tuple[str, ...]
    patches: tuple[str, ...]
    error: str | None


@dataclass
class _Graft:
    handle: Handle
    options: dict[str, Any]
    patches: PatchSet


@dataclass
class _Plugin:
    """An entry point and what has become of it."""

    name: str
    distribution: str
    entry: importlib.metadata.EntryPoint
    hooks: Any = None
    info: PluginInfo | None = None
    grafts: list[_Graft] = field(default_factory=list)
    kernels: PatchSet | None = None

    def open(self) -> PluginInfo:
        """Import the plugin and ask for its info; both are remembered once they have worked.

        Raises:
            PluginError: that failed, whatever the reason; a plugin must not be able to break another one.
        """
        if self.info is not None:
            return self.info
        # One pluggy manager per plugin: a hook call reaches this plugin alone, and its errors are its own.
        hooks = pluggy.PluginManager("kernelgraft")
        hooks.add_hookspecs(hookspecs)
        try:
            module = self.entry.load()
            _refuse_unmarked_hooks(module)
            hooks.register(module)
            hooks.check_pending()
            info = hooks.hook.kernelgraft_info()
        except (Exception, SystemExit) as error:  # a module that exits while it is imported is broken, no more
            raise self.broken("cannot be imported", error) from error
        if not isinstance(info, PluginInfo):
            raise PluginError(f"plugin {self.name!r} from {self.distribution} has no kernelgraft_info: got {info!r}")
        if _canonical(info.name) != self.name:
            raise PluginError(f"plugin {self.name!r} from {self.distribution} calls itself {info.name!r}")
        self.hooks, self.info = hooks.hook, info
        return info

    def broken(self, what: str, error: BaseException) -> PluginError:
        return PluginError(f"plugin {self.name!r} from {self.distribution} {what}: {type(error).__name__}: {error}")


class Manager:
    """All plugins of this process. Made once, by :func:`manager`.

    The entry points of every installed distribution are read at once; a plugin is imported when it is asked for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._plugins: dict[str, _Plugin] = {}
        self._doubles: list[_Plugin] = []
        found = importlib.metadata.entry_points(group=GROUP)
        listed = [_Plugin(_canonical(e.name), e.dist.name if e.dist else "an unknown source", e) for e in found]
        # In an order of our own, because that of discovery varies; ours first, so that nobody shadows them.
        listed.sort(key=lambda plugin: (plugin.distribution != OWN_DISTRIBUTION, plugin.distribution))
        for plugin in listed:
            if self._plugins.setdefault(plugin.name, plugin) is not plugin:
                self._doubles.append(plugin)

    def load(self, name: str, options: Mapping[str, Any]) -> Handle:
        """See :func:`kernelgraft.load_plugin`."""
        with self._lock:
            plugin = self._find(name)
            info = plugin.open()
            hosts = _chosen_hosts(info, options.get("host"))
            modules = tuple(host.module for host in hosts)
            full = {**options, "host": modules[0]} if len(modules) == 1 else dict(options)
            for graft in plugin.grafts:
                if graft.handle.hosts == modules and graft.options == full:
                    return graft.handle
                if graft.handle.hosts == modules or set(graft.handle.hosts) & set(modules):
                    raise PluginError(
                        f"plugin {plugin.name!r} is loaded with {graft.options}: "
                        f"unload it before loading it with {full}"
                    )
            for host in hosts:
                require_host(plugin.name, host)
            warn_about_untested_versions()
            return self._graft(plugin, Handle(self, info, modules), full)

    def unload(self, name: str) -> None:
        """See :func:`kernelgraft.unload_plugin`."""
        with self._lock:
            plugin = self._find(name)
            for graft in reversed(plugin.grafts.copy()):
                self._take_off(plugin, graft)

    def unload_graft(self, handle: Handle) -> None:
        """Undo the one graft that ``handle`` stands for, if it still stands."""
        with self._lock:
            plugin = self._plugins[_canonical(handle.info.name)]
            for graft in plugin.grafts.copy():
                if graft.handle is handle:
                    self._take_off(plugin, graft)

    def graft_onto(self, host: str) -> list[Handle]:
        """Load every plugin that offers ``host``, for a host that asks for plugins in its own processes.

        Only plugins of this distribution are considered, and those named in ``KERNELGRAFT_PLUGINS``: a third party's
        must not enter an engine unasked. One that only brings kernels is loaded when it is named there, as no user code
        runs in such a process that could load it. What fails is logged as an error and left out.
        """
        named = _allowed()
        handles = []
        for plugin in list(self._plugins.values()):
            unnamed_third_party = named is None and plugin.distribution != OWN_DISTRIBUTION
            if unnamed_third_party or (named is not None and plugin.name not in named):
                continue
            try:
                with self._lock:
                    offered = {requirement.module for requirement in plugin.open().hosts}
                if host in offered:
                    handles.append(self.load(plugin.name, {"host": host}))
                elif named is not None and not offered:
                    handles.append(self.load(plugin.name, {}))
            except (KernelgraftError, ValueError) as error:
                log.error("not loaded into %s: %s", host, error)
        return handles

    def status(self) -> list[PluginStatus]:
        """See :func:`kernelgraft.plugins`."""
        with self._lock:
            named = _allowed()
            rows = [self._status_of(p) for p in self._plugins.values() if named is None or p.name in named]
            for double in self._doubles:
                error = f"the name is taken by the plugin from {self._plugins[double.name].distribution}"
                rows.append(PluginStatus(double.name, double.distribution, None, (), (), (), error))
        return sorted(rows, key=lambda row: row.name)

    def unknown_names(self) -> list[str]:
        """Names in ``KERNELGRAFT_PLUGINS`` that no installed plugin has."""
        return sorted((_allowed() or set()) - self._plugins.keys())

    def examine(self, name: str) -> list[Check]:
        """The plugin's own checks; one that raises is a check that failed."""
        with self._lock:
            plugin = self._find(name)
            plugin.open()
        try:
            return list(plugin.hooks.kernelgraft_doctor() or ())
        except Exception as error:
            return [Check("kernelgraft_doctor", False, f"{type(error).__name__}: {error}")]

    def _find(self, name: str) -> _Plugin:
        named = _allowed()
        known = sorted(p for p in self._plugins if named is None or p in named)
        plugin = self._plugins.get(_canonical(name))
        if plugin is not None and plugin.name in known:
            return plugin
        hidden = f"is hidden by KERNELGRAFT_PLUGINS={os.environ.get('KERNELGRAFT_PLUGINS')!r}"
        raise PluginNotFound(
            f"plugin {name!r} {hidden if plugin else 'is not installed'}; known: {', '.join(known) or 'none'}"
        )

    def _graft(self, plugin: _Plugin, handle: Handle, options: dict[str, Any]) -> Handle:
        first = plugin.kernels is None
        patches = PatchSet(plugin.name)
        try:
            if first:
                plugin.kernels = PatchSet(plugin.name)
                self._add_kernels(plugin, plugin.kernels)
            handle._offered = plugin.hooks.kernelgraft_apply(patches=patches, options=dict(options))
        except BaseException as error:
            self._roll_back(plugin, patches, error, kernels=first)
            if isinstance(error, (KernelgraftError, ValueError)) or not isinstance(error, Exception):
                raise
            raise plugin.broken("cannot be loaded", error) from error
        plugin.grafts.append(_Graft(handle, options, patches))
        log.info("loaded %r: %d changes", handle, len(patches.targets()))
        return handle

    @staticmethod
    def _add_kernels(plugin: _Plugin, patches: PatchSet) -> None:
        for kernel in plugin.hooks.kernelgraft_register_kernels() or ():
            if not isinstance(kernel, Kernel):
                raise PluginError(f"plugin {plugin.name!r} yields {kernel!r} as a kernel, expected Kernel(...)")
            importlib.import_module(kernel.module)
            from kernelgraft_core.runtime.op import registered_ops  # here: it imports torch

            op = registered_ops().get(kernel.op)
            if op is None:
                raise PluginError(
                    f"plugin {plugin.name!r} replaces op {kernel.op!r}, which {kernel.module} does not define; "
                    f"known: {', '.join(sorted(registered_ops()))}"
                )
            patches.on_undo(f"kernel {kernel.op}[{kernel.implementation.backend}]", op.register(kernel.implementation))

    @staticmethod
    def _roll_back(plugin: _Plugin, patches: PatchSet, error: BaseException, kernels: bool) -> None:
        for changes in (patches, plugin.kernels if kernels else None):
            try:
                if changes is not None:
                    changes.undo(leave_conflicts=True)
            except PluginError as trouble:  # the first error is the one to raise; this one goes with it
                error.add_note(str(trouble))
        if kernels:
            plugin.kernels = None

    @staticmethod
    def _take_off(plugin: _Plugin, graft: _Graft) -> None:
        try:
            graft.patches.undo()
        finally:
            if not graft.patches.targets():  # otherwise a conflict was found first, and the graft stands
                plugin.grafts.remove(graft)
                if not plugin.grafts and plugin.kernels is not None:
                    plugin.kernels.undo()
                    plugin.kernels = None
        log.info("unloaded %r", graft.handle)

    @staticmethod
    def _status_of(plugin: _Plugin) -> PluginStatus:
        info: PluginInfo | None = None
        hosts: tuple[HostStatus, ...] = ()
        error: str | None = None
        try:
            info = plugin.open()
            hosts = tuple(inspect_host(host) for host in info.hosts)
        except PluginError as broken:
            error = str(broken)
        loaded = tuple("+".join(graft.handle.hosts) or "-" for graft in plugin.grafts)
        sets = [graft.patches for graft in plugin.grafts] + ([plugin.kernels] if plugin.kernels else [])
        patches = tuple(target for changes in sets for target in changes.targets())
        return PluginStatus(plugin.name, plugin.distribution, info, hosts, loaded, patches, error)


def manager() -> Manager:
    """The manager of this process."""
    with _making:
        return _made()


_making = threading.Lock()
_made = cache(Manager)  # a cached function may run twice when two threads call it first: hence the lock


def _refuse_unmarked_hooks(module: object) -> None:
    """A hook without its decorator would be ignored without a word."""
    for name, spec in vars(hookspecs).items():
        hook = getattr(module, name, None)
        if hasattr(spec, "kernelgraft_spec") and hook is not None and not hasattr(hook, "kernelgraft_impl"):
            raise TypeError(f"{name} is not marked with @hookimpl")


def _canonical(name: str) -> str:
    return name.strip().replace("_", "-")


def _allowed() -> set[str] | None:
    """The names in ``KERNELGRAFT_PLUGINS``, None when it is unset: every plugin. Set but empty allows none."""
    text = os.environ.get("KERNELGRAFT_PLUGINS")
    return None if text is None else {_canonical(name) for name in text.split(",") if name.strip()}


def _chosen_hosts(info: PluginInfo, named: object) -> tuple[HostRequirement, ...]:
    """The host the user named, else all that are grafted in-process."""
    offered = ", ".join(host.module for host in info.hosts) or "none"
    if named is None:
        chosen = tuple(host for host in info.hosts if host.in_process and not host.optional)
        if not chosen and not all(host.optional for host in info.hosts):
            raise InvalidOption(
                f"plugin {info.name!r} is loaded by its host, in processes of the host's own; "
                f"to graft it onto this process, name the host: {offered}"
            )
        return chosen
    chosen = tuple(host for host in info.hosts if host.module == named)
    if not chosen:
        raise InvalidOption(f"plugin {info.name!r} has no host {named!r}; it offers: {offered}")
    return chosen
