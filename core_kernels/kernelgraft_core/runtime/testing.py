"""Helpers for tests of ops and backends, here and in other people's backends."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def assert_close(name: str, ref: Tensor, out: Tensor, ratio: float) -> None:
    """Compare by relative root mean square: ``rms(out - ref) / rms(ref) <= ratio``.

    One bound then fits every element however small it is by cancellation, which a bound per element does not. Where
    ``ref`` is infinite or NaN, ``out`` must be the same; those elements take no part in the ratio.

    Args:
        name: what is compared, for the message, e.g. ``"grad_x"``.
        ref: what is right; float64 is best. Any shape, device and dtype.
        out: what is checked, of the same shape.
        ratio: largest allowed, e.g. ``0.005`` for float16 results. 0 demands equality.

    Raises:
        AssertionError: shapes differ, or the ratio is above; the message gives it, the shapes and the worst element.
    """
    __tracebackhide__ = True
    if ref.shape != out.shape:
        raise AssertionError(f"{name}: shape is {tuple(out.shape)}, expected {tuple(ref.shape)}")
    if ref.numel() == 0:
        return
    wanted, found = (t.detach().cpu().to(torch.float64) for t in (ref, out))
    finite = wanted.isfinite()
    difference = torch.where(finite, found - wanted, 0.0)
    alike = torch.where(finite, found.isfinite(), (found == wanted) | (found.isnan() & wanted.isnan()))
    if not alike.all():
        # A number where there should be none, or none where there should be one: worse than any difference.
        difference = torch.where(alike, difference, math.inf)
    error = difference.square().mean().sqrt().item()
    scale = torch.where(finite, wanted, 0.0).square().mean().sqrt().item()
    measured = error / scale if scale else (math.inf if error else 0.0)
    if measured <= ratio:
        return
    flat = int(difference.abs().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ref.shape))
    raise AssertionError(
        f"{name}: relative RMS error {measured:.3g} is above {ratio:.3g}; worst at {index}: "
        f"{found.flatten()[flat].item():.6g}, expected {wanted.flatten()[flat].item():.6g} "
        f"({out.dtype} {tuple(out.shape)} against {ref.dtype}, {int((~alike).sum())} elements not finite alike)"
    )


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin (``empty_like``, ``new_empty``, ...) give NaN or the largest integer.

    A kernel that reads memory it never wrote then fails every time instead of once in a while. It is torch's own
    ``fill_uninitialized_memory``, so memory that operators allocate for themselves is filled as well; operators
    without a deterministic version warn.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its properties are made where type checkers do not see them
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not enabled or warn_only)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def rng(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of its own, so that one test's numbers do not depend on what ran before it."""
    return torch.Generator(device).manual_seed(seed)
