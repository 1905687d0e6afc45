"""The device report: what it says is what torch, the system and independent arithmetic say."""

import os
import subprocess
import sys

import pytest
import torch

from kernelgraft_core.runtime import device


def cpu(capability, *isa):
    return device.CpuInfo("vendor", "model", 4, frozenset(isa), capability, 0)


@pytest.mark.parametrize(
    ("info", "key"),
    [
        (cpu("AVX512", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx"), "cpu-amx"),
        (cpu("AVX512", "avx2", "avx512f", "avx512_vnni", "avx512_bf16"), "cpu-avx512bf16"),
        (cpu("AVX512_VNNI", "avx2", "avx512f", "avx512_vnni"), "cpu-avx512vnni"),
        (cpu("AVX512", "avx2", "avx512f"), "cpu-avx512"),
        (cpu("AVX2", "avx2", "avx512f", "avx512_bf16"), "cpu-avx2"),  # lowered by ATEN_CPU_CAPABILITY
        (cpu("DEFAULT", "avx2", "avx512f"), "cpu-generic"),
        (cpu("DEFAULT", "neon", "dotprod"), "cpu-neon"),
        (cpu("SVE256", "neon", "sve"), "cpu-sve"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_architecture_is_the_best_that_torch_uses(info, key):
    assert device._cpu_arch(info) == key


def test_the_report_agrees_with_torch():
    info = device.device_info()
    assert info.cpu.torch_capability == torch.backends.cpu.get_cpu_capability()
    assert ("avx2" in info.cpu.isa) == torch.cpu._is_avx2_supported()
    assert ("avx512_vnni" in info.cpu.isa) == torch.cpu._is_vnni_supported()
    assert 1 <= info.cpu.cores <= os.cpu_count()
    assert len(info.gpus) == torch.cuda.device_count()
    assert info.c_compiler is None or os.access(info.c_compiler, os.X_OK)
    assert device.arch_key("cpu").startswith("cpu-")
    assert device.machine_name(device.arch_key("cpu")) == info.cpu.model


def test_other_devices_have_no_plans():
    with pytest.raises(ValueError, match="no plans are kept for meta"):
        device.arch_key("meta")


@pytest.mark.gpu
def test_a_gpu_is_named_by_its_capability():
    major, minor = torch.cuda.get_device_capability()
    assert device.arch_key("cuda") == f"sm_{major}{minor}"
    assert device.machine_name(device.arch_key("cuda")) == torch.cuda.get_device_name()


PROBE = """
import torch
from kernelgraft_core.runtime.device import cpu_int8_is_exact
generator = torch.Generator().manual_seed(0)
a, b = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in ((32, 256), (256, 64)))
exact = torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())
extreme = torch._int_mm(torch.full((32, 256), 127, dtype=torch.int8), torch.full((64, 256), 127, dtype=torch.int8).t())
print(cpu_int8_is_exact(), exact and bool((extreme == 127 * 127 * 256).all()))
"""


@pytest.mark.parametrize("isa", [None, "AVX2"])
def test_the_int8_probe_tells_whether_products_are_exact(isa):
    if isa and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("not an x86 processor with AVX2")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    if isa:
        environment["ONEDNN_MAX_CPU_ISA"] = isa
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    probed, exact = run.stdout.split()
    assert probed != "True" or exact == "True"  # never claims exactness that is not there
    if isa == "AVX2":
        assert probed == "False"
