"""The doctor's report: plain data, true to what is installed, and not stopped by what is broken."""

import importlib
import json
import os

import pytest
import torch

import kernelgraft
from kernelgraft import diagnosis, families
from kernelgraft.cli import listing
from kernelgraft.manager import Manager
from kernelgraft_core.runtime.device import DeviceInfo, GpuInfo, cpu_info
from kernelgraft_core.runtime.op import Implementation, registered_ops

FAMILY = "kernelgraft_core.quant.w4a16"
SHAPE = {"op": "w4a16_linear", "device": "cpu"}


@pytest.fixture
def add_backend():
    """Add a CPU backend to w4a16_linear for this test."""
    undo = []
    importlib.import_module(f"{FAMILY}.ops")

    def add(name, run=lambda *args: None, supports=None):
        undo.append(registered_ops()["w4a16_linear"].register(Implementation(name, run, ("cpu",), 99, supports)))

    yield add
    for function in undo:
        function()


def verdict(backend):
    (row,) = [row for row in families.verdicts(FAMILY) if row.items() >= {**SHAPE, "backend": backend}.items()]
    return row["verdict"]


def test_the_report_is_plain_data_with_everything_promised(fresh_manager):
    report = kernelgraft.doctor()
    assert json.loads(json.dumps(report)) == report
    assert all(f"``{key}``" in kernelgraft.doctor.__doc__ for key in report)
    assert report["kernelgraft"] == kernelgraft.__version__
    assert report["libraries"]["torch"] == torch.__version__
    assert {host["module"] for host in report["hosts"]} >= {"transformers", "vllm"}
    (awq,) = [plugin for plugin in report["plugins"] if plugin["name"] == "awq"]
    assert awq["checks"]
    assert bool(report["gpus"]) == torch.cuda.is_available()


def test_every_backend_has_a_verdict(add_backend, monkeypatch):
    add_backend("picky", supports=lambda *args: "it is Sunday")
    assert verdict("picky") == "it is Sunday"
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    assert verdict("reference") == "runs"
    assert verdict("picky") == "KERNELGRAFT_BACKEND is reference"


def test_a_backend_that_cannot_be_asked_does_not_hide_the_others(add_backend):
    add_backend("broken", supports=lambda *args: 1 / 0)
    assert verdict("broken") == "broken: ZeroDivisionError: division by zero"
    assert verdict("reference") == "ready"
    checks = {check.what: check for check in families.compare_with_reference(FAMILY)}
    assert not checks["w4a16_linear on cpu, backend broken"].ok
    assert checks["w4a16_linear on cpu, backend reference"].ok


def test_wrong_results_fail_the_check(add_backend, monkeypatch):
    add_backend("wrong", run=lambda x, qweight, *_: x.new_ones(x.shape[0], qweight.shape[0]))
    add_backend("raising", run=lambda *_: 1 / 0)
    checks = {check.what: check for check in families.compare_with_reference(FAMILY)}
    assert not checks["w4a16_linear on cpu, backend wrong"].ok
    assert "ZeroDivisionError" in checks["w4a16_linear on cpu, backend raising"].detail
    assert "KERNELGRAFT_BACKEND" not in os.environ


def test_an_op_that_writes_to_an_argument_is_checked_by_what_it_writes():
    checks = {check.what: check for check in families.compare_with_reference("kernelgraft_core.quant.kv4")}
    for op in ("kv4_append", "kv4_attention"):
        assert {f"{op} on cpu, backend cpu", f"{op} on cpu, backend reference"} <= checks.keys()
    assert all(check.ok for check in checks.values()), checks


def test_tips_name_what_is_missing_and_what_it_costs(site, monkeypatch):
    monkeypatch.setattr(diagnosis, "installed_version", lambda name: None)
    monkeypatch.setenv("KERNELGRAFT_PLUGINS", "awq,gone")
    tips = "\n".join(diagnosis._tips(Manager(), has_gpu=True, compiler=None))
    assert "pip install 'kernelgraft[cpu]'" in tips
    assert "no C compiler found" in tips
    assert "Triton is missing" in tips
    assert "names 'gone', which is not installed" in tips


def test_a_gpu_is_shown_with_capability_and_memory(fresh_manager, capsys, monkeypatch):
    gpu = GpuInfo(0, "NVIDIA H200", (9, 0), 141 * 2**30, 132)
    machine = DeviceInfo(cpu_info(), (gpu,), "3.9.0", None)
    monkeypatch.setattr("kernelgraft_core.runtime.device.device_info", lambda: machine)
    report = kernelgraft.doctor()
    assert json.loads(json.dumps(report)) == report
    assert report["gpus"][0]["capability"] == [9, 0]
    assert any("no C compiler" in tip for tip in report["tips"])
    listing._print_report(report)
    assert "GPU: NVIDIA H200 (9.0, 141 GiB)" in capsys.readouterr().out
