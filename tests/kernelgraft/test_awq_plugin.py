"""The awq plugin itself: what it asks of its hosts and which integration it hands the patches to."""

import sys
import types

import pytest

import kernelgraft
import kernelgraft_vllm
from kernelgraft.builtin import awq


@pytest.fixture
def grafted(site, fresh_manager, monkeypatch):
    """Transformers' integration, recorded instead of run."""
    calls = []
    module = types.ModuleType("kernelgraft_transformers.awq")
    module.graft = calls.append
    monkeypatch.setitem(sys.modules, "kernelgraft_transformers.awq", module)
    return calls


def test_a_script_gets_the_transformers_graft(site, grafted):
    site.host("transformers", "5.23.9")
    handle = kernelgraft.load_plugin("awq")
    assert handle is kernelgraft.load_plugin("awq", host="transformers")
    assert [patches.owner for patches in grafted] == ["awq"]
    assert (handle.info.name, handle.hosts) == ("awq", ("transformers",))
    kernelgraft.unload_plugin("awq")


def test_vllm_is_grafted_when_named(site, grafted, monkeypatch):
    calls = []
    site.host("vllm", "0.32.0")
    monkeypatch.setattr(kernelgraft_vllm, "register_awq", calls.append)
    with kernelgraft.load_plugin("awq", host="vllm") as handle:
        assert handle.hosts == ("vllm",)
    assert len(calls) == 1
    assert grafted == []


@pytest.mark.parametrize("version", ["5.16.0", "5.24.0"])
def test_other_versions_of_transformers_are_refused(site, grafted, version):
    site.host("transformers", version)
    with pytest.raises(kernelgraft.IncompatibleHost, match=rf"transformers >=5.17,<5.24: transformers {version}"):
        kernelgraft.load_plugin("awq")
    assert grafted == []


def test_options_it_does_not_know_are_refused(site, grafted):
    site.host("transformers", "5.19.0")
    with pytest.raises(ValueError, match="no option 'group_size'; it takes host"):
        kernelgraft.load_plugin("awq", group_size=128)
    with pytest.raises(kernelgraft.InvalidOption, match="no host 'sglang'; it offers: transformers, vllm"):
        kernelgraft.load_plugin("awq", host="sglang")


def test_its_kernels_agree_with_the_reference():
    checks = list(awq.kernelgraft_doctor())
    ops = {f"{name}_linear{part}" for name in ("w4a16", "w3a16") for part in ("", "_dgrad")}
    assert {check.what.split()[0] for check in checks} == ops | {"dequantize_w4a16", "dequantize_w3a16"}
    assert [check for check in checks if not check.ok] == []
