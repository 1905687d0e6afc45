"""Compile a Triton kernel for a GPU that is not there, and read what the compiler made of it.

Registers, spills, shared memory and the instructions of the main loop decide most of a kernel's speed, and mistakes
in them show without a GPU: a spill, a tile that no GPU can launch, a load that is not prefetched, idle tensor cores.
Needs Triton alone, not CUDA: cuobjdump, nvdisasm and ptxas are in its wheel.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Bytes of shared memory that one program may use, registers and warps of a multiprocessor, and programs on it.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
WARPS = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAMS = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS = 65_536


@dataclass(frozen=True)
class AotReport:
    """What one kernel became on one architecture.

    Attributes:
        kernel: its name.
        arch: compute capability times ten.
        registers: per thread.
        stack, local: bytes per thread in memory; anything but 0 is a spill.
        shared: bytes of shared memory per program.
        warps, stages: as it was compiled.
        buffers: how many tiles each prefetched operand has in shared memory.
        waits: copies that may be outstanding when the loop, in its steady state, waits for the oldest; 0 means that the
            loop waits for all of them, which is no prefetching. None without asynchronous copies.
        loop: how often each SASS instruction, with its modifiers, stands in the main loop: the one with the most matrix
            instructions, else the longest; the whole kernel when it has none.
        matrix: PTX matrix instructions, e.g. ``wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16``.
        register_operand: the left operand of some Hopper matrix instruction comes from registers.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    stages: int
    buffers: tuple[int, ...]
    waits: int | None
    loop: dict[str, int]
    matrix: tuple[str, ...]
    register_operand: bool

    @property
    def launchable(self) -> bool:
        """Whether its shared memory fits the architecture, which compiling does not check."""
        return self.shared <= SHARED[self.arch]

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        # The driver keeps 1 KB of shared memory per program; a multiprocessor has 1 KB more than one program may use.
        shared = (SHARED[self.arch] + 1024) // (self.shared + 1024)
        return min(REGISTERS // registers, shared, WARPS[self.arch] // self.warps, PROGRAMS[self.arch])

    def count(self, *names: str) -> int:
        """Instructions in the main loop with one of these names, whatever their modifiers."""
        return sum(n for opcode, n in self.loop.items() if opcode.partition(".")[0] in names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"resident": self.resident, "launchable": self.launchable}


def report(
    kernel: Any,
    arguments: Mapping[str, str | int],
    constants: Mapping[str, Any],
    arch: int,
    *,
    warps: int,
    stages: int,
    registers: int | None = None,
) -> AotReport:
    """Compile a ``triton.jit`` function as a call with these arguments would.

    Args:
        kernel: the function.
        arguments: for every argument that is not constant, a pointer type such as ``"*fp16"`` (16-byte aligned, as
            torch allocates) or an example integer, which is specialized on 1 and on multiples of 16 as in a call.
        constants: the ``tl.constexpr`` arguments.
        arch: compute capability times ten: 80, 89, 90, 100 or 120.
        warps, stages, registers: ``num_warps``, ``num_stages`` and ``maxnreg``.

    Raises:
        ValueError: an architecture without known limits.
        triton.CompilationError: the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if arch not in SHARED:
        raise ValueError(f"arch is {arch}, expected one of {sorted(SHARED)}")
    signature: dict[str, str] = {}
    fixed = dict(constants)
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = arguments[name]
        if isinstance(value, str):
            signature[name] = value
            attributes[index,] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], fixed[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": registers},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", cubin.name)
        sass = _run(tools / "nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        raise ValueError(f"cuobjdump reports no resources of {kernel.__name__}: {usage!r}")
    registers, stack, local = (int(value) for value in found.groups())
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    waits = [int(n) for n in re.findall(r"async_wait .*?num = (\d+)", ttgir)]
    return AotReport(
        kernel.__name__, arch, registers, stack, local, compiled.metadata.shared, warps, stages,
        buffers=tuple(int(n) for n in re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+", ttgir)),
        waits=max(waits) if waits else None,
        loop=dict(collections.Counter(_main_loop(sass)).most_common()),
        matrix=tuple(sorted(set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", ptx)))),
        # The left operand is a list of registers where it could be a descriptor of shared memory.
        register_operand=bool(re.search(r"wgmma\.mma_async[\w.]*\s*\{[^}]*\},\s*\{", ptx)),
    )  # fmt: skip


def markdown(reports: list[AotReport]) -> str:
    """A table of reports for the documentation."""
    head = "| kernel | arch | warps | stages | registers | spills | shared KB | programs per SM | matrix instructions |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for r in reports:
        cells = (
            r.kernel, f"sm_{r.arch}", r.warps, r.stages, r.registers, r.stack + r.local, f"{r.shared / 1024:.1f}",
            r.resident, ", ".join(sorted({_shape(m) for m in r.matrix})) or "none",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _shape(instruction: str) -> str:
    shape = re.search(r"m\d+n\d+k\d+", instruction)
    return instruction.partition(".")[0] + (f" {shape.group()}" if shape else "")


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _main_loop(sass: str) -> list[str]:
    """Instruction names of the main loop of a disassembly, see :attr:`AotReport.loop`."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(names)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            names.append(instruction.group(1))
            target = re.search(r"\.L_x_\d+", instruction.group(2))
            if instruction.group(1).startswith("BRA") and target and target.group() in labels:
                loops.append(names[labels[target.group()] :])
    # After its end a program branches to itself for ever: loops of one instruction are none.
    loops = [loop for loop in loops if len(loop) > 1]
    return max(loops, key=lambda loop: (sum("MMA" in name for name in loop), len(loop)), default=names)
