"""Reversible changes to a host: every change is recorded, and undone only where nobody else has changed it since."""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .errors import PatchConflict, PluginError

log = logging.getLogger("kernelgraft")
_Place = tuple[int, str, Any]  # id of the container, kind of place, name or key: equal for the same place
_ABSENT = object()
_lock = threading.RLock()
_standing: list[_Change] = []  # the changes of all patch sets: tells whose a value is
_ages = itertools.count()


@dataclass(frozen=True, eq=False)
class _Change:
    """One place in a host, what was there and what is there now."""

    made_by: PatchSet
    what: str
    place: _Place
    read: Callable[[], Any]
    write: Callable[[Any], None]
    before: Any
    after: Any


class PatchSet:
    """The changes one plugin has made to a host, in order.

    Args:
        owner: name of the plugin, for messages.

    The three ways to change a host (:meth:`attr`, :meth:`wrap`, :meth:`item`) take effect at once. :meth:`undo` takes
    all of them back in reverse. Two plugins may patch the same place; then the one loaded later must be unloaded first.
    All three raise :class:`PatchConflict`, and change nothing, when the place holds the patch of a set made after this
    one: each would then have to be undone before the other.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._age = next(_ages)
        self._changes: list[_Change | tuple[str, Callable[[], None]]] = []

    def attr(self, target: Any, name: str, value: Any) -> None:
        """Set ``target.name``, where ``target`` is a module, a class or an object with a ``__dict__``.

        What stood in ``target.__dict__`` is put back as it was (a ``staticmethod`` stays one); an attribute that came
        from a base class or from a module's ``__getattr__`` is uncovered again.

        Raises:
            AttributeError: the target has no such attribute; a host that moved it would otherwise never notice ours.
            TypeError: the target does not keep the attribute in its ``__dict__``, so that it could not be put back.
        """
        label = f"{_label(target)}.{name}"
        if not hasattr(target, name):
            raise AttributeError(f"{self.owner} cannot patch {label}: there is no such attribute")
        own = getattr(target, "__dict__", {})
        if not isinstance(target, type) and inspect.isdatadescriptor(getattr(type(target), name, None)):
            raise TypeError(f"{self.owner} cannot patch {label}: it is computed by its class; patch the class")
        before = own.get(name, _ABSENT)
        place = (id(target), "attribute", name)
        self._refuse_over_newer(place, label, before)

        def write(new: Any) -> None:
            if new is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, new)

        seen = getattr(target, name)
        setattr(target, name, value)
        if own.get(name, _ABSENT) is not value:
            setattr(target, name, seen)
            raise TypeError(f"{self.owner} cannot patch {label}: it is not kept in the target's __dict__")
        self._record(_Change(self, label, place, lambda: own.get(name, _ABSENT), write, before, value))

    def wrap(self, target: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the function ``target.name`` by ``make(function)``; static and class methods stay what they are.

        For a class method or an ordinary method ``function`` is the plain function, to be called with ``cls`` or
        ``self``. Raises as :meth:`attr` does.
        """
        if isinstance(target, type):
            raw = inspect.getattr_static(target, name, None)
            if isinstance(raw, staticmethod | classmethod):
                self.attr(target, name, type(raw)(make(raw.__func__)))
                return
        self.attr(target, name, make(getattr(target, name)))

    def item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set one entry of a registry-like mapping; a new key is removed again, an old one gets its value back."""
        what = f"entry {key!r} of {type(mapping).__name__}"
        before = mapping.get(key, _ABSENT)
        place = (id(mapping), "entry", key)
        self._refuse_over_newer(place, what, before)

        def write(new: Any) -> None:
            if new is _ABSENT:
                del mapping[key]
            else:
                mapping[key] = new

        mapping[key] = value
        self._record(_Change(self, what, place, lambda: mapping.get(key, _ABSENT), write, before, value))

    def on_undo(self, what: str, undo: Callable[[], None]) -> None:
        """Record how to take back a change made by other means, named ``what`` in reports."""
        self._changes.append((what, undo))

    def targets(self) -> list[str]:
        """What is changed now, oldest first."""
        return [_name_of(change) for change in self._changes]

    def undo(self, *, leave_conflicts: bool = False) -> None:
        """Take everything back, newest first; an empty set stays empty.

        Args:
            leave_conflicts: leave places alone that somebody else has changed since, and undo the rest, instead of
                refusing; for the way out of a load that failed.

        Raises:
            PatchConflict: somebody else has changed one of the places since. Nothing has been undone then.
            PluginError: a function given to :meth:`on_undo` raised (chained), or a conflict was left. Everything else
                has been undone, and the set is empty.
        """
        with _lock:
            if not leave_conflicts:
                self._check()
            failed: list[tuple[str, Exception]] = []
            while self._changes:
                change = self._changes.pop()
                try:
                    if isinstance(change, _Change):
                        _standing.remove(change)
                        self._require_ours(change, change.read())
                        change.write(change.before)
                    else:
                        change[1]()
                except Exception as error:  # one that cannot be undone must not keep the others in place
                    failed.append((_name_of(change), error))
        if failed:
            listed = "; ".join(f"{what} ({type(error).__name__}: {error})" for what, error in failed)
            raise PluginError(f"{self.owner} could not undo {listed}") from failed[0][1]

    def _record(self, change: _Change) -> None:
        with _lock:
            if under := self._other_set(change.place, change.before):
                log.info("%s patches %s over %s", self.owner, change.what, under.owner)
            _standing.append(change)
        self._changes.append(change)

    def _check(self) -> None:
        """Walk the undo without doing it: each place must hold what this set put there."""
        holds: dict[_Place, Any] = {}
        for change in reversed(self._changes):
            if not isinstance(change, _Change):
                continue
            self._require_ours(change, holds[change.place] if change.place in holds else change.read())
            holds[change.place] = change.before

    def _require_ours(self, change: _Change, now: Any) -> None:
        if now is change.after:
            return
        if other := self._other_set(change.place, now):
            raise PatchConflict(
                f"{change.what} was patched by {other.owner!r} after {self.owner!r}: "
                f"unload {other.owner!r} first, then {self.owner!r}"
            )
        raise PatchConflict(
            f"{change.what} was changed by something other than kernelgraft after {self.owner!r} patched it, "
            f"to {_shown(now)}: undo that first, then unload {self.owner!r}"
        )

    def _refuse_over_newer(self, place: _Place, what: str, now: Any) -> None:
        with _lock:
            other = self._other_set(place, now)
        if other and other._age > self._age:
            raise PatchConflict(
                f"{what} was patched by {other.owner!r}, which was loaded after {self.owner!r}: "
                f"{self.owner!r} cannot patch it before {other.owner!r} is unloaded"
            )

    def _other_set(self, place: _Place, value: Any) -> PatchSet | None:
        """The other patch set that put ``value`` at ``place``, if one did."""
        others = (change for change in _standing if change.made_by is not self)
        return next((change.made_by for change in others if change.place == place and change.after is value), None)


def _name_of(change: _Change | tuple[str, Callable[[], None]]) -> str:
    return change.what if isinstance(change, _Change) else change[0]


def _label(target: Any) -> str:
    if isinstance(target, type):
        return f"{target.__module__}.{target.__qualname__}"
    return target.__name__ if isinstance(target, ModuleType) else f"{type(target).__name__} object"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
