"""What is made of tensors once and kept beside them: other layouts of a weight, most of all.

In a table and not on the tensor or its module: libraries copy, save and count what those hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """A table of what ``make`` makes; an entry lives as long as the first of its tensors does.

    It is made anew when another tensor is used with the first, or when one was changed in place. Writes that autograd
    does not count (to tensors of inference mode, through numpy) are not noticed.
    """

    def __init__(self) -> None:
        # By identity: tensors compare elementwise.
        self._known: dict[int, tuple[tuple[_Stamp, ...], T]] = {}

    def of(self, tensors: Sequence[Tensor | None], make: Callable[[], T]) -> T:
        """What was made of ``tensors``, the first of which is there."""
        first = tensors[0]
        assert first is not None
        key = id(first)
        known = self._known.get(key)
        if known is not None and all(map(_is_same, known[0], tensors)):
            return known[1]
        if known is None:
            weakref.finalize(first, self._known.pop, key, None)
        made = make()
        self._known[key] = tuple(map(_stamp, tensors)), made
        return made

    def __len__(self) -> int:
        return len(self._known)


@dataclass
class _Kept(Generic[T]):
    pair: tuple[list[Tensor | None], T]  # one object, so that no thread sees new values with what old ones made


class DerivedOfValues(Generic[T]):
    """As :class:`Derived`, for parameters on a CPU: their values are compared with those of before, too.

    Parameters are written to behind autograd's back, by ``.data``, which averages of weights and ``Module.to`` use, and
    which changes no version.
    """

    def __init__(self) -> None:
        self._table: Derived[_Kept[T]] = Derived()

    def of(self, tensors: Sequence[Tensor | None], make: Callable[[], T]) -> T:
        """What was made of ``tensors``, the first of which is there."""
        kept = self._table.of(tensors, lambda: _Kept((list(map(_copy, tensors)), make())))
        values, made = kept.pair
        if not all(map(_has_values, values, tensors)):
            made = make()
            kept.pair = list(map(_copy, tensors)), made
        return made


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


# A tensor, by a reference and not by its number alone, which another one gets when it is gone; and its version.
_Stamp = tuple[weakref.ref[Tensor], int] | None


def _stamp(tensor: Tensor | None) -> _Stamp:
    return None if tensor is None else (weakref.ref(tensor), _version(tensor))


def _is_same(stamp: _Stamp, tensor: Tensor | None) -> bool:
    if stamp is None or tensor is None:
        return stamp is None and tensor is None
    return stamp[0]() is tensor and stamp[1] == _version(tensor)


def _has_values(kept: Tensor | None, tensor: Tensor | None) -> bool:
    if kept is None or tensor is None:
        return kept is None and tensor is None
    return kept.dtype == tensor.dtype and kept.device == tensor.device and torch.equal(kept, tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
