"""Go over the op families of kernelgraft_core: which backend would run each op here, and whether it computes right."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .hookspecs import Check

if TYPE_CHECKING:
    import torch

    from kernelgraft_core.runtime.op import Op

FAMILIES = tuple(
    f"kernelgraft_core.{name}"
    for name in ("quant.w4a16", "quant.w3a16", "quant.w4a8", "quant.kv4", "sparse.maps", "sparse.conv",
                 "sparse.pair_gemm", "boxes.overlap", "boxes.nms", "boxes.points", "boxes.vertices", "points.voxelize",
                 "points.reduce", "points.sampling", "points.neighbors", "points.roi_pool",
                 "vision.deform_attention", "point_attention.attention", "point_attention.norm_ffn",
                 "point_attention.linear")
)  # fmt: skip
"""Packages with a module ``ops`` that defines ops, and a module ``examples``: ``example_args(device, **sizes)`` gives
arguments for each op, ``peer(op, args)`` what it is measured against, and ``TUNED`` names those that can be tuned."""

BROKEN = "broken"
"""How the verdict on a backend begins that raised when it was asked whether it can run."""

TOLERANCE = 1e-2
"""Relative root mean square that a result in bfloat16 may be away from float64: rounding it alone costs 0.2 %."""


def devices() -> list[str]:
    """The device types that this machine has."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def verdicts(family: str) -> list[dict[str, str]]:
    """For each op, device type and backend: ``"runs"``, ``"ready"`` (another one is preferred) or why it cannot run."""
    rows = []
    for op, device, args in _examples(family):
        found = _explain(op, device, args)
        rows += [{"op": op.name, "device": device, "backend": k, "verdict": v} for k, v in found.items()]
    return rows


def compare_with_reference(family: str) -> Iterator[Check]:
    """Run every op of a family on every backend that can, and compare with the reference in float64."""
    for op, device, args in _examples(family):
        with forced("reference"):
            truth = _computed(op, tuple(map(_widened, args)))
        for backend, verdict in _explain(op, device, args).items():
            what = f"{op.name} on {device}, backend {backend}"
            if verdict.startswith(BROKEN):
                yield Check(what, False, verdict)
            if verdict not in ("runs", "ready"):
                continue
            try:
                with forced(backend):
                    found = _computed(op, args)
                    error = max(relative_error(out, true) for out, true in zip(found, truth, strict=True))
            except Exception as trouble:
                yield Check(what, False, f"{type(trouble).__name__}: {trouble}")
            else:
                yield Check(what, error < TOLERANCE, f"relative error {error:.1e}, allowed {TOLERANCE:.0e}")


def _explain(op: Op, device: str, args: tuple[Any, ...]) -> dict[str, str]:
    """``op.explain``, but a backend that raises when it is asked is reported instead of hiding the others."""
    try:
        return op.explain(device, *args)
    except Exception:  # which one raised is found by asking them one at a time
        return {backend: _explain_one(op, device, args, backend) for backend in op.backends(device)}


def _explain_one(op: Op, device: str, args: tuple[Any, ...], backend: str) -> str:
    try:
        with forced(backend):
            verdict = op.explain(device, *args)[backend]
    except Exception as error:
        return f"{BROKEN}: {type(error).__name__}: {error}"
    return "ready" if verdict == "runs" else verdict


def examples_of(family: str) -> Any:
    """The module ``examples`` of a family, whose ops are then registered."""
    importlib.import_module(f"{family}.ops")
    return importlib.import_module(f"{family}.examples")


def _examples(family: str) -> Iterator[tuple[Op, str, tuple[Any, ...]]]:
    from kernelgraft_core.runtime.op import registered_ops

    examples = examples_of(family)
    for device in devices():
        for name, args in examples.example_args(device).items():
            yield registered_ops()[name], device, args


def _computed(op: Op, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an op gives, or makes of copies of the arguments that it writes to."""
    if not op.mutates:
        out = op(*args)
        return list(out) if isinstance(out, tuple | list) else [out]
    copies = [value.clone() if place in op.mutates else value for place, value in enumerate(args)]
    op(*copies)
    return [copies[place] for place in op.mutates]


def _widened(value: Any) -> Any:
    """The examples are in bfloat16; everything that is becomes float64."""
    import torch

    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        return value.double()
    return torch.float64 if value is torch.bfloat16 else value


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the truth's own."""
    wide = truth.double()
    difference = out.double() - wide
    size = float(wide.square().mean().sqrt())
    return float(difference.square().mean().sqrt()) / size if size else float(difference.abs().max())


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Inside, ops run on this backend or not at all."""
    before = os.environ.get("KERNELGRAFT_BACKEND")
    os.environ["KERNELGRAFT_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["KERNELGRAFT_BACKEND"]
        else:
            os.environ["KERNELGRAFT_BACKEND"] = before
