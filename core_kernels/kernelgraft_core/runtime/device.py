"""What this machine has: instruction sets, GPUs, compilers, and a probe for exact int8 products."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("kernelgraft")

# Instruction sets that a kernel of ours asks about: our name -> names in /proc/cpuinfo (x86 "flags", Arm "Features").
_ISA = {
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx_vnni": ("avx_vnni",),
    "avx512f": ("avx512f",),
    "avx512bw": ("avx512bw",),
    "avx512vl": ("avx512vl",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "avx512_fp16": ("avx512_fp16",),
    "amx": ("amx_tile",),
    "neon": ("asimd", "neon"),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
    "sve": ("sve",),
}


@dataclass(frozen=True)
class CpuInfo:
    """The processor. ``isa`` holds names such as ``"avx2"``, ``"avx512_vnni"``, ``"amx"``, ``"neon"``.

    Attributes:
        vendor, model: as the system names them, e.g. ``"AuthenticAMD"`` and ``"AMD EPYC 7763"``.
        cores: logical processors this process may run on.
        isa: what the hardware has.
        torch_capability: what torch uses of it (``ATEN_CPU_CAPABILITY`` lowers it), e.g. ``"AVX512"``.
        last_level_cache: bytes, 0 where the system does not tell.
    """

    vendor: str
    model: str
    cores: int
    isa: frozenset[str]
    torch_capability: str
    last_level_cache: int


@dataclass(frozen=True)
class GpuInfo:
    """One GPU: ``capability`` is ``(major, minor)``, ``memory`` in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int


@dataclass(frozen=True)
class DeviceInfo:
    """The whole machine, as ``kernelgraft doctor`` and benchmark results show it.

    Attributes:
        triton: its version, None where it is not installed.
        c_compiler: path of the compiler that Triton's launcher would use, None where there is none.
    """

    cpu: CpuInfo
    gpus: tuple[GpuInfo, ...]
    triton: str | None
    c_compiler: str | None


def device_info() -> DeviceInfo:
    """Everything about this machine. Looks at GPUs, which starts CUDA where there is one."""
    return DeviceInfo(cpu_info(), gpu_info(), version_of("triton"), c_compiler())


@functools.cache
def cpu_info() -> CpuInfo:
    """The processor; read once."""
    fields = _proc_cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    isa = {name for name, spellings in _ISA.items() if flags.intersection(spellings)}
    if not flags:  # macOS, Windows
        if platform.machine().lower() in ("arm64", "aarch64"):
            isa = {"neon"}
        elif torch.cpu._is_avx2_supported():
            isa = {"avx2", "fma", "f16c"}
    return CpuInfo(
        vendor=fields.get("vendor_id") or fields.get("CPU implementer") or platform.machine(),
        model=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        isa=frozenset(isa),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        last_level_cache=_last_level_cache(),
    )


@functools.cache
def gpu_info() -> tuple[GpuInfo, ...]:
    """The GPUs torch can use; empty without any. Read once."""
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            GpuInfo(
                index,
                properties.name,
                (properties.major, properties.minor),
                properties.total_memory,
                properties.multi_processor_count,
            )
        )
    return tuple(found)


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def c_compiler() -> str | None:
    """Path of the C compiler that Triton builds its launcher with: ``$CC``, gcc, clang or cc."""
    for name in (os.environ.get("CC"), "gcc", "clang", "cc"):
        if name and (path := shutil.which(name)):
            return path
    return None


def arch_key(device: torch.device | str) -> str:
    """What plans are kept under: ``"cpu-avx2"``, ``"cpu-avx512bf16"``, ``"sm_90"``, ``"gfx942"``, ...

    On CPU it is the best instruction set that the hardware has and torch uses, so a lowered ``ATEN_CPU_CAPABILITY`` has
    plans of its own.

    Raises:
        ValueError: the device is neither a CPU nor a GPU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_arch(cpu_info())
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _gpu_arch(index)
    raise ValueError(f"no plans are kept for {device}: expected a cpu or cuda device")


def machine_name(arch: str) -> str:
    """The model that stands behind an architecture here: two GPUs of one architecture may want different plans."""
    if arch.startswith("cpu-"):
        return cpu_info().model
    return next((gpu.name for gpu in gpu_info() if _gpu_arch(gpu.index) == arch), "")


@functools.cache
def cpu_int8_is_exact() -> bool:
    """Whether torch's int8 matrix products (``onednn.qlinear``, ``torch._int_mm``) are exact on this CPU.

    Without VNNI, oneDNN adds pairs of products in 16 bits and saturates: the result is silently wrong by up to 99 %.
    The probe multiplies the largest values once per process; False also where torch lacks oneDNN.
    """
    ops = torch.ops.onednn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "qlinear_pointwise"):
        log.info("torch has no oneDNN int8 products here")
        return False
    rows, columns, depth = 32, 64, 256
    weight = torch.full((columns, depth), 127, dtype=torch.int8)
    product = 127 * 127 * depth
    packed = ops.qlinear_prepack(weight, [rows, depth])
    shifted = torch.full((rows, depth), 127 + 128, dtype=torch.uint8)  # 127 with the zero point 128
    scales, zero_points = torch.ones(columns), torch.zeros(columns, dtype=torch.int32)
    linear = ops.qlinear_pointwise(
        shifted, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    plain = torch._int_mm(torch.full((rows, depth), 127, dtype=torch.int8), weight.t())
    return bool((linear == product).all() and (plain == product).all())


def _cpu_arch(cpu: CpuInfo) -> str:
    if cpu.torch_capability.startswith("AVX512"):
        for flag, name in (("amx", "amx"), ("avx512_bf16", "avx512bf16"), ("avx512_vnni", "avx512vnni")):
            if flag in cpu.isa:
                return f"cpu-{name}"
        return "cpu-avx512"
    if cpu.torch_capability == "AVX2":
        return "cpu-avx2"
    for flag in ("sve", "neon"):
        if flag in cpu.isa:
            return f"cpu-{flag}"
    return "cpu-generic"


@functools.cache
def _gpu_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _proc_cpuinfo() -> dict[str, str]:
    """Fields of the first processor in Linux's /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if not line.strip() and fields:
                break
            fields[name.strip()] = value.strip()
    return fields


def _last_level_cache() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)
