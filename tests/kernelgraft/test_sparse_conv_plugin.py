"""The sparse-conv plugin itself: what it offers, and other libraries' names while it is loaded."""

import importlib
import sys
import types

import pytest

import kernelgraft
from kernelgraft.builtin import sparse_conv


@pytest.fixture(autouse=True)
def nothing_imported(fresh_manager, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("spconv", "torchsparse"):
            monkeypatch.delitem(sys.modules, name)


def test_a_handle_offers_the_engine():
    with kernelgraft.load_plugin("sparse-conv") as plugin:
        assert plugin.nn.SubMConv3d(4, 8, 3).weight.shape == (27, 1, 4, 8)
        assert plugin.info.paper == "arXiv 2311.12862"


@pytest.mark.parametrize("facade", ["spconv", "torchsparse", "torchsparse2"])
def test_a_facade_is_there_until_it_is_unloaded(facade):
    name = facade.removesuffix("2")
    with kernelgraft.load_plugin("sparse-conv", facade=facade):
        found = importlib.import_module(name)
        assert found.__doc__.endswith("kernelgraft's kernels")
        assert hasattr(importlib.import_module("spconv.pytorch" if name == "spconv" else "torchsparse.nn"), "__path__")
    assert not [module for module in sys.modules if module.partition(".")[0] == name]


def test_a_library_that_is_imported_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", types.ModuleType("spconv"))
    with pytest.raises(ValueError, match="spconv is imported already"):
        kernelgraft.load_plugin("sparse-conv", facade="spconv")
    assert "spconv.pytorch" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"), [({"facade": "minkowski"}, "facade is 'minkowski'"), ({"fast": True}, "no option 'fast'")]
)
def test_options_it_does_not_know_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kernelgraft.load_plugin("sparse-conv", **options)


def test_its_kernels_agree_with_the_reference():
    checks = list(sparse_conv.kernelgraft_doctor())
    ops = {check.what.split()[0] for check in checks}
    assert {"sparse_neighbors", "sparse_conv", "sparse_conv_dgrad", "sparse_conv_wgrad", "pair_gemm"} <= ops
    assert all(check.ok for check in checks), checks
