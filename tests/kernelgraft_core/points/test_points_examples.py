"""The example arguments of every family: all backends agree on them, and say why where they cannot run."""

import importlib
import importlib.util

import pytest
import torch

from kernelgraft_core.runtime.op import registered_ops
from kernelgraft_core.runtime.testing import assert_close

FAMILIES = ["voxelize", "reduce", "sampling", "neighbors", "roi_pool"]


def examples(family):
    importlib.import_module(f"kernelgraft_core.points.{family}.ops")
    args = importlib.import_module(f"kernelgraft_core.points.{family}.examples").example_args("cpu")
    return [(registered_ops()[name], each) for name, each in args.items()]


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree(family, monkeypatch):
    pytest.importorskip("numba")
    for op, args in examples(family):
        found = []
        for backend in op.backends("cpu"):
            monkeypatch.setenv("KERNELGRAFT_BACKEND", backend)
            out = op(*args)
            found.append(out if isinstance(out, tuple) else (out,))
        assert len(found) == 2
        for first, second in zip(*found, strict=True):
            assert_close(op.name, first, second, 1e-2 if first.is_floating_point() else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_numba_the_reference_runs(family, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "numba" else found(name, *a))
    for op, args in examples(family):
        verdicts = op.explain("cpu", *args)
        if op.name != "roi_aware_gradient":  # torch's own operators
            assert verdicts == {"cpu": "numba is not installed", "reference": "runs"}
        op(*args)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_the_references(family):
    for op, args in examples(family):
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        assert op.name == "roi_aware_gradient" or op.explain("cpu", *wide)["reference"] == "runs"
