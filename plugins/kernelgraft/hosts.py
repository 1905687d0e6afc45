"""Which hosts are installed, and whether their versions are among those that were tested. Nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from dataclasses import dataclass
from functools import cache

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .errors import IncompatibleHost
from .hookspecs import HostRequirement

log = logging.getLogger("kernelgraft")

TESTED = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.9")}
"""Releases that the kernels are tested with; others are used with a warning."""


@dataclass(frozen=True)
class HostStatus:
    """A host as found on this machine.

    Attributes:
        module: import name of the host.
        distribution: the installed distribution, None when there is none.
        version: its version.
        specifier: the versions asked for.
        problem: why it cannot be used, None when it can.
    """

    module: str
    distribution: str | None
    version: str | None
    specifier: str
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def inspect_host(host: HostRequirement) -> HostStatus:
    """Find a host under any of its distribution names and compare its version with the range."""
    for distribution in host.distributions:
        version = installed_version(distribution)
        if version is not None:
            break
    else:
        return HostStatus(host.module, None, None, host.specifier, "not installed")
    problem = None
    try:
        # Pre-releases count: nightly builds of hosts are in daily use.
        if not SpecifierSet(host.specifier).contains(Version(version), prereleases=True):
            problem = "outside the tested range"
    except InvalidVersion:
        problem = "not a version that can be compared"
    if problem is None and host.module not in sys.modules and importlib.util.find_spec(host.module) is None:
        problem = f"installed, but the module {host.module} cannot be found"
    return HostStatus(host.module, distribution, version, host.specifier, problem)


def require_host(plugin: str, host: HostRequirement) -> None:
    """Refuse a host that is missing or outside its range.

    Raises:
        IncompatibleHost: with the range and what was found.
    """
    status = inspect_host(host)
    if status.ok:
        return
    names = " or ".join(host.distributions)
    found = f"{status.distribution} {status.version} is {status.problem}" if status.version else "none is installed"
    raise IncompatibleHost(f"plugin {plugin!r} needs {names} {host.specifier}: {found}")


def untested_versions() -> list[str]:
    """One sentence for each of torch and Triton that is installed in a release the kernels are not tested with."""
    sentences = []
    for distribution, tested in TESTED.items():
        version = installed_version(distribution)
        if version is not None and ".".join(version.split(".")[:2]) not in tested:
            sentences.append(f"{distribution} {version} is untested; tested are {' and '.join(tested)}")
    return sentences


@cache
def warn_about_untested_versions() -> None:
    """Log :func:`untested_versions`, once per process."""
    for sentence in untested_versions():
        log.warning("%s", sentence)
