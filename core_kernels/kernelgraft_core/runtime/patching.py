"""What an integration may ask of the patch set it is handed, which is a ``kernelgraft.patches.PatchSet``."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Protocol


class Patches(Protocol):
    """A record of changes to a host, each of which can be taken back. Integrations are typed with this, not with the
    class, because they must not import ``kernelgraft``.
    """

    def attr(self, target: Any, name: str, value: Any) -> None:
        """Set ``target.name``; raises AttributeError when the host has no such attribute."""

    def wrap(self, target: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the function ``target.name`` by ``make(function)``."""

    def item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set one entry of a registry-like mapping, whether or not the key is there already."""

    def on_undo(self, what: str, undo: Callable[[], None]) -> None:
        """Record how to take back a change made by other means; ``what`` names it for reports."""
