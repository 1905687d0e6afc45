"""Plans: which tile, dataflow or algorithm to use for a shape, measured once and remembered.

Looking up never measures: the user's own file comes first, then a preset that is shipped with the package, and without
either the op's heuristic decides. Measuring happens only inside ``with PLANS.tuning():``. A backend writes::

    plan = PLANS.lookup("w4a16_linear", VERSION, arch, {"m": bucket, "n": n, "k": k})
    if PLANS.should_tune("w4a16_linear", VERSION, arch, shape):
        plan = PLANS.tune("w4a16_linear", VERSION, arch, shape, candidates, measure)
    tile = heuristic(shape) if plan is None else plan["tile"]

The op buckets its shapes (M to a power of two, say) and raises its version when the meaning of its parameters changes.
A plan holds enumerated parameters only, never code, and a backend takes only values that are candidates of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import logging
import math
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import device

try:
    import fcntl
except ImportError:  # Windows: without a lock between processes, the last one to save wins
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("kernelgraft")

SCHEMA = 1
PRESETS = Path(__file__).parent / "presets"
_LARGEST_FILE = 16 << 20  # bytes; ours have some kilobytes

Scalar = str | int | float | bool | None
Plan = Mapping[str, Scalar]
Candidates = Mapping[str, tuple[Plan, Callable[[], object]]]


def cache_directory() -> Path:
    """What the user keeps: ``$KERNELGRAFT_CACHE_DIR``, else ``kernelgraft`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("KERNELGRAFT_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kernelgraft"


class PlanStore:
    """Plans by op, op version, architecture and shape; safe to use from several threads and processes.

    One JSON file per architecture and machine model, in a directory that only its owner may write. It is read when the
    first plan of the architecture is looked up, as are ``KERNELGRAFT_PLANS`` (``off``: no stored plan is used, only
    heuristics) and ``KERNELGRAFT_CACHE_DIR``.

    Args:
        directory: of the user's files; ``plans`` in :func:`cache_directory` by default.
        presets: of the shipped files, ``<arch>.json``.
    """

    def __init__(self, directory: Path | None = None, presets: Path = PRESETS) -> None:
        self._directory = directory
        self._presets = presets
        self._loaded: dict[str, dict[str, Plan]] = {}
        self._memo: dict[tuple[Any, ...], Plan | None] = {}
        self._measured: dict[str, dict[str, dict[str, Any]]] = {}
        self._lock = threading.RLock()
        self._tuned: contextvars.ContextVar[set[tuple[str, str]] | None] = contextvars.ContextVar("tuned", default=None)

    def lookup(
        self,
        op: str,
        version: int,
        arch: str,
        shape: Mapping[str, Scalar],
        candidates: Collection[Plan] | None = None,
    ) -> Plan | None:
        """The parameters stored for a shape, or None: then the op's heuristic decides. Never measures, never raises.

        Args:
            arch: as :func:`~kernelgraft_core.runtime.device.arch_key` gives it.
            shape: the op's bucketed shape and dtype, JSON scalars.
            candidates: the parameters the op would take; a stored plan that is none of them is ignored.
        """
        # Items as they come: a caller always builds its shape in the same order, and sorting costs more than a miss.
        key = (op, version, arch, *shape.items())
        try:
            plan = self._memo[key]
        except KeyError:
            with self._lock:
                plan = self._memo[key] = self._plans(arch).get(plan_key(op, version, shape))
        return plan if plan is None or candidates is None or plan in candidates else None

    @contextlib.contextmanager
    def tuning(self) -> Iterator[None]:
        """Inside, in this thread, ops may measure; what they find is saved at the end, even after an error.

        Raises:
            RuntimeError: ``KERNELGRAFT_PLANS`` is off: nothing would be remembered.
        """
        if _switched_off():
            raise RuntimeError("KERNELGRAFT_PLANS is off: nothing measured would be used")
        token = self._tuned.set(set())
        try:
            yield
        finally:
            self._tuned.reset(token)
            self.save()

    @property
    def is_tuning(self) -> bool:
        """Whether this thread is inside :meth:`tuning`: a cheap question for a hot path, before :meth:`should_tune`."""
        return self._tuned.get() is not None

    def should_tune(self, op: str, version: int, arch: str, shape: Mapping[str, Scalar]) -> bool:
        """Whether an op is asked to measure this shape now: inside :meth:`tuning`, once for each shape."""
        tuned = self._tuned.get()
        return tuned is not None and (arch, plan_key(op, version, shape)) not in tuned

    def tune(
        self,
        op: str,
        version: int,
        arch: str,
        shape: Mapping[str, Scalar],
        candidates: Candidates,
        measure: Callable[[Callable[[], object]], float],
    ) -> Plan:
        """Measure the candidates and remember the fastest.

        Args:
            candidates: ``name -> (parameters, run)``. One that raises here is left out, and logged.
            measure: microseconds of one run.

        Returns:
            The parameters of the fastest.

        Raises:
            RuntimeError: outside :meth:`tuning`, during the capture of a CUDA graph, or when every candidate failed.
            ValueError: parameters that are not JSON scalars.
        """
        tuned = self._tuned.get()
        if tuned is None:
            raise RuntimeError(f"{op}: measuring is allowed only inside `with PLANS.tuning():`")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: cannot measure while a CUDA graph is captured; tune before")
        for name, (params, _) in candidates.items():
            if not _is_plan(params):
                raise ValueError(f"{op}: candidate {name!r} has parameters {params!r}, expected JSON scalars by name")
        times: dict[str, float] = {}
        failures: list[str] = []
        for name, (_, run) in candidates.items():
            try:
                times[name] = measure(run)
            except Exception as error:  # whatever a compiler or driver raises: this candidate cannot run here
                failures.append(f"{name}: {type(error).__name__}: {error}")
                log.info("%s: candidate %s failed while tuning: %s", op, name, error)
        if not times:
            raise RuntimeError(f"{op}: no candidate could be measured: {'; '.join(failures) or 'none given'}")
        fastest = min(times, key=times.__getitem__)
        params = dict(candidates[fastest][0])
        key = plan_key(op, version, shape)
        entry = {
            "params": params,
            "us": {name: round(t, 3) for name, t in times.items()},
            "with": {"torch": torch.__version__, "triton": device.version_of("triton")},
            "date": datetime.now(UTC).date().isoformat(),
        }
        with self._lock:
            plans = self._plans(arch)
            plans[key] = MappingProxyType(params)
            self._measured.setdefault(arch, {})[key] = entry
            self._memo.clear()
        tuned.add((arch, key))
        return plans[key]

    def save(self) -> None:
        """Write what was measured into the user's files, merged with what other processes wrote meanwhile.

        A file is replaced in one step. One that cannot be written costs a warning: the plans stay in memory.
        """
        with self._lock:
            for arch in list(self._measured):
                try:
                    self._save(arch, self._measured[arch])
                except OSError as error:
                    log.warning("plans for %s are not saved: %s", arch, error)
                else:
                    del self._measured[arch]

    def path(self, arch: str) -> Path:
        """The user's file for an architecture on this machine."""
        model = hashlib.sha256(device.machine_name(arch).encode()).hexdigest()[:8]
        return self.directory / f"v{SCHEMA}-{arch}-{model}.json"

    @property
    def directory(self) -> Path:
        return self._directory or cache_directory() / "plans"

    def _plans(self, arch: str) -> dict[str, Plan]:
        with self._lock:
            if arch not in self._loaded:
                entries: dict[str, Any] = {}
                if not _switched_off():
                    entries = self._read_preset(arch) | self._read_own(arch)
                self._loaded[arch] = {key: MappingProxyType(entry["params"]) for key, entry in entries.items()}
            return self._loaded[arch]

    def _read_preset(self, arch: str) -> dict[str, Any]:
        path = self._presets / f"{arch}.json"
        try:
            return _parse(path.read_bytes()) if path.is_file() else {}
        except (_UnusableError, OSError) as error:
            log.warning("the plans shipped in %s are not used: %s", path, error)
            return {}

    def _read_own(self, arch: str) -> dict[str, Any]:
        path = self.path(arch)
        try:
            if path.parent.exists():
                _check_owner(path.parent)
            with path.open("rb") as file:
                return _parse(file.read(_LARGEST_FILE + 1))
        except FileNotFoundError:
            return {}
        except _UnusableError as error:
            bad = path.with_suffix(".bad")
            log.warning("plans in %s are unusable (%s): moved to %s, defaults are used", path, error, bad.name)
            with contextlib.suppress(OSError):
                os.replace(path, bad)
            return {}
        except OSError as error:
            log.warning("plans in %s are not used: %s", path, error)
            return {}

    def _save(self, arch: str, entries: Mapping[str, Any]) -> None:
        path = self.path(arch)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(path.parent)
        with _locked(path.with_suffix(".lock")):
            document = {
                "schema": SCHEMA,
                "arch": arch,
                "machine": device.machine_name(arch),
                "plans": self._read_own(arch) | dict(entries),
            }
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".plans-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(document, file, indent=1, sort_keys=True)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise


PLANS = PlanStore()


def plan_key(op: str, version: int, shape: Mapping[str, Scalar]) -> str:
    """``"op@version|k=4096,m=16"``, the name of a plan in a file."""
    return f"{op}@{version}|" + ",".join(f"{name}={shape[name]}" for name in sorted(shape))


class _UnusableError(ValueError):
    """A plan file whose content is not ours."""


def _parse(content: bytes) -> dict[str, Any]:
    if len(content) > _LARGEST_FILE:
        raise _UnusableError(f"above {_LARGEST_FILE} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise _UnusableError(f"not a plan file of schema {SCHEMA}")
    plans = document.get("plans")
    if not isinstance(plans, dict):
        raise _UnusableError("it holds no plans")
    for key, entry in plans.items():
        if not isinstance(entry, dict) or not _is_plan(entry.get("params")):
            raise _UnusableError(f"plan {key!r} does not hold scalars by name")
    return plans


def _is_plan(params: object) -> bool:
    return isinstance(params, Mapping) and all(
        isinstance(name, str)
        and (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)))
        for name, value in params.items()
    )


def _switched_off() -> bool:
    return os.environ.get("KERNELGRAFT_PLANS", "").lower() == "off"


def _check_owner(directory: Path) -> None:
    """Plans steer kernels: a directory that somebody else can write is neither read nor written."""
    if not hasattr(os, "getuid"):
        return
    status = directory.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{directory} is writable by others (mode {stat.S_IMODE(status.st_mode):o})")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as gate:
        if fcntl is not None:
            fcntl.flock(gate, fcntl.LOCK_EX)
        yield
