"""The qoq plugin itself: what it asks of its host and which integration it hands the patches to."""

import sys
import types

import pytest

import kernelgraft
import kernelgraft_vllm
from kernelgraft.builtin import qoq


@pytest.fixture
def grafted(site, fresh_manager, monkeypatch):
    """Transformers' integration, recorded instead of run."""
    calls = []
    module = types.ModuleType("kernelgraft_transformers.qoq")
    module.graft = lambda *args: calls.append(args)
    monkeypatch.setitem(sys.modules, "kernelgraft_transformers.qoq", module)
    return calls


def test_a_script_gets_the_transformers_graft(site, grafted):
    site.host("transformers", "5.23.9")
    handle = kernelgraft.load_plugin("qoq")
    assert [(patches.owner, weight) for patches, weight in grafted] == [("qoq", "int4")]
    assert (handle.info.name, handle.hosts) == ("qoq", ("transformers",))
    kernelgraft.unload_plugin("qoq")


def test_vllm_is_grafted_when_named(site, grafted, monkeypatch):
    calls = []
    site.host("vllm", "0.32.0")
    monkeypatch.setattr(kernelgraft_vllm, "register_qoq", calls.append)
    with kernelgraft.load_plugin("qoq", host="vllm") as handle:
        assert handle.hosts == ("vllm",)
    assert [patches.owner for patches in calls] == ["qoq"]
    assert grafted == []
    with pytest.raises(ValueError, match="cpu_weight is for Transformers"):
        kernelgraft.load_plugin("qoq", host="vllm", cpu_weight="int8")


@pytest.mark.parametrize("version", ["5.16.0", "5.24.0"])
def test_other_versions_of_transformers_are_refused(site, grafted, version):
    site.host("transformers", version)
    with pytest.raises(kernelgraft.IncompatibleHost, match=rf"transformers >=5.17,<5.24: transformers {version}"):
        kernelgraft.load_plugin("qoq")
    assert grafted == []


def test_options_it_does_not_know_are_refused(site, grafted):
    site.host("transformers", "5.19.0")
    with pytest.raises(ValueError, match="no option 'group_size'; it takes host and cpu_weight"):
        kernelgraft.load_plugin("qoq", group_size=128)


def test_its_kernels_agree_with_the_reference():
    checks = list(qoq.kernelgraft_doctor())
    assert {check.what.split()[0] for check in checks} == {"w4a8_linear", "kv4_append", "kv4_attention"}
    assert all(check.ok for check in checks), checks
