"""Which kernel and tile multiplies with a packed weight: the configurations, what each should cost, and the choice.

Nothing here imports Triton or needs a GPU. The cost model ranks a handful of tiles; its constants are data sheet
numbers and instruction counts read from SASS. A measured plan overrides it.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from kernelgraft_core.runtime.plans import PLANS

VERSIONS = {3: 1, 4: 1}  # by bits; a new version makes stored plans void
UNPACKED = {3: 30, 4: 40}  # weights per clock and multiprocessor: 4 and 3 instructions each, at 32 lanes times 4


@dataclass(frozen=True)
class Config:
    """One enumerated way to run the multiplication; what a plan stores.

    Attributes:
        kernel: ``slice_k``, ``gemm`` or ``dequantize`` (dequantize, then cuBLAS; it has no tile of its own).
        block_m: tokens per program.
        block_n: output features per program.
        block_k: columns per step, of each warp for ``slice_k``.
        splits: programs that share an output tile along K (``gemm``); a second kernel sums their float32 parts.
        warps: warps per program.
        stages: depth of the software pipeline; ``stages - 1`` tiles are in flight.
        registers: allowed per thread, 0 for what ptxas chooses; given where ptxas would spill to fit one more program.
    """

    kernel: Literal["slice_k", "gemm", "dequantize"]
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    splits: int = 1
    warps: int = 0
    stages: int = 0
    registers: int = 0

    @property
    def step(self) -> int:
        """Columns that a program consumes per iteration."""
        return self.block_k * (self.warps if self.kernel == "slice_k" else 1)

    def stage_bytes(self, bits: int) -> int:
        """Shared memory of one stage, without the scales, for weights of so many bits."""
        return (self.block_n * bits // 8 + self.block_m * 2) * self.step


@dataclass(frozen=True)
class Architecture:
    """What the cost model knows of a GPU generation: data sheet numbers of its usual member."""

    multiprocessors: int
    clock: float  # GHz
    macs: int  # dense 16-bit multiply-accumulates per clock and multiprocessor
    memory: float  # GB/s
    shared: int  # bytes one program may use
    tiles: tuple[Config, ...]


DEQUANTIZE = Config("dequantize")
SPLITS = (1, 2, 4, 8)
MAX_SPLIT_TOKENS = 256  # beyond this many tokens there are tiles enough without splitting K


def _slice_k(block_m: int, block_n: int, block_k: int, warps: int, registers: int = 0) -> Config:
    return Config("slice_k", block_m, block_n, block_k, 1, warps, 4, registers)


def _gemm(block_m: int, block_n: int, block_k: int, warps: int) -> Config:
    return Config("gemm", block_m, block_n, block_k, 1, warps, 4)


_DECODE = (
    _slice_k(8, 16, 128, 8),
    _slice_k(8, 16, 64, 4),
    _slice_k(8, 32, 64, 4),
    _slice_k(16, 16, 64, 4),
    _slice_k(16, 32, 64, 4, registers=128),
)
_SMALL = (_gemm(32, 64, 64, 4), _gemm(32, 128, 64, 4), _gemm(64, 64, 64, 4))
# mma.sync: warps that share rows of the weight unpack them again, twice here, four times with eight warps.
_AMPERE = (*_DECODE, *_SMALL, _gemm(64, 128, 32, 4), _gemm(128, 128, 32, 4))
# wgmma: one warpgroup unpacks every weight once. 128 x 256 reads x from L2 half as often.
_HOPPER = (*_DECODE, *_SMALL, _gemm(64, 128, 64, 4), _gemm(128, 128, 64, 4), _gemm(128, 256, 64, 8))
# tcgen05: weights go through tensor memory.
_BLACKWELL = (*_DECODE, *_SMALL, _gemm(64, 128, 64, 8), _gemm(128, 128, 64, 8))

ARCHITECTURES = {
    80: Architecture(108, 1.41, 1024, 1_555, 163 << 10, _AMPERE),
    89: Architecture(142, 2.20, 512, 864, 99 << 10, _AMPERE),
    90: Architecture(132, 1.75, 2048, 3_350, 227 << 10, _HOPPER),
    100: Architecture(148, 1.85, 4096, 8_000, 227 << 10, _BLACKWELL),
}


def architecture(capability: tuple[int, int]) -> int | None:
    """The entry of :data:`ARCHITECTURES` that speaks for a compute capability; None below 8.0."""
    major, minor = capability
    if major < 8:
        return None
    if major in (9, 10):
        return major * 10
    return 80 if (major, minor) == (8, 0) else 89  # the small Amperes, Ada and 12.x all have 99 KB of shared memory


def candidates(arch: int, bits: int, m: int, n: int, k: int, group: int, packed: bool = True) -> tuple[Config, ...]:
    """Every configuration that makes sense for ``(m, k) @ (n, k).T``, for a tuner to measure.

    Args:
        arch: key of :data:`ARCHITECTURES`.
        bits: of a weight, 3 or 4.
        m, n, k: tokens, output and input features, none of them 0.
        group: columns that share a scale.
        packed: whether the kernels may read the scales of several rows at once: rows innermost, multiples of four.
    """
    found = []
    for tile in ARCHITECTURES[arch].tiles:
        whole_groups = group == k or group % tile.block_k == 0 or (tile.block_k % group == 0 and group >= 32)
        if tile not in list_selectable(arch, ragged=not (packed and whole_groups)):
            continue
        if tile.kernel == "slice_k":
            if m <= tile.block_m and (m > 8 or tile.block_m == 8):
                found.append(tile)
        elif m > 16 and (tile.block_m == 32 or m > tile.block_m // 2):
            steps = -(-k // tile.block_k)
            for splits in SPLITS if m <= MAX_SPLIT_TOKENS else (1,):
                if splits == 1 or steps >= 8 * splits:
                    found.append(replace(tile, splits=splits))
    if m > 128:
        found.append(DEQUANTIZE)
    return tuple(found)


@functools.cache
def list_selectable(arch: int, ragged: bool = False) -> tuple[Config, ...]:
    """Every tile that :func:`heuristic` can pick on an architecture; splitting K does not change a kernel's loop.

    With ``ragged`` those for groups that are small or straddle tiles, and for scales that are read one by one: larger
    tiles would spill, or not fit shared memory.
    """
    tiles = ARCHITECTURES[arch].tiles
    if not ragged:
        return tiles
    return tuple(t for t in tiles if t.block_m * t.block_n <= 64 * 64 and t.block_n != 32 and t.step <= 256)


def estimate(arch: int, bits: int, config: Config, m: int, n: int, k: int, group: int) -> float:
    """Microseconds that a configuration should take: the slowest of tensor cores, unpacking, L2 and memory.

    Rounded up to whole waves, with a memory bandwidth that too few bytes in flight cannot reach.
    """
    gpu = ARCHITECTURES[arch]
    cycles_per_us = gpu.clock * 1e3
    bytes_per_us = gpu.memory * 1e3
    launch, latency = 2.0, 0.9
    weight_bytes = n * k * (bits / 8 + 3 / group)
    activation_bytes = 2 * (m * k + m * n)
    if config.kernel == "dequantize":
        multiply = m * n * k / (gpu.macs * gpu.multiprocessors * cycles_per_us * 0.8)
        return 2 * launch + (weight_bytes + 4 * n * k) / bytes_per_us + max(multiply, activation_bytes / bytes_per_us)
    tiles = -(-m // config.block_m) * -(-n // config.block_n) * config.splits
    resident = max(1, min(gpu.shared // (config.stage_bytes(bits) * (config.stages - 1)), 16 // config.warps))
    waves = -(-tiles // (gpu.multiprocessors * resident))
    steps = -(-k // (config.step * config.splits))
    # A third of the tensor cores' rate is lost to barriers and to unpacking that does not overlap.
    tensor = config.block_m * config.block_n * config.step / (gpu.macs * 0.65)
    unpack = config.block_n * config.step / UNPACKED[bits]
    per_multiprocessor = min(resident, -(-tiles // gpu.multiprocessors))
    compute = waves * steps * max(tensor, unpack) * per_multiprocessor / cycles_per_us
    in_flight = min(tiles, gpu.multiprocessors * resident) * config.stage_bytes(bits) * (config.stages - 1)
    traffic = tiles * steps * config.step * (config.block_n * bits / 8 + 2 * min(m, config.block_m))
    memory = max(
        (weight_bytes + activation_bytes) / min(bytes_per_us, in_flight / latency), traffic / (2.0 * bytes_per_us)
    )
    total = launch + 2 * latency + max(compute, memory)
    if config.splits > 1:
        total += launch + 8 * config.splits * m * n / (2.0 * bytes_per_us)
    return total


@functools.lru_cache(maxsize=4096)
def heuristic(arch: int, bits: int, m: int, n: int, k: int, group: int, packed: bool = True) -> Config:
    """The cheapest candidate by :func:`estimate`; float16 and bfloat16 cost the same."""
    found = candidates(arch, bits, m, n, k, group, packed)
    return min(found, key=lambda config: estimate(arch, bits, config, m, n, k, group))


def plan_op(bits: int) -> tuple[str, int]:
    """The op and the version that plans for weights of so many bits are kept under."""
    return f"w{bits}a16_linear", VERSIONS[bits]


def plan_shape(dtype: torch.dtype, m: int, n: int, k: int, group: int) -> dict[str, str | int]:
    """What a plan is kept under: M rounded up to a power of two, the rest as it is."""
    return {"m": 1 << (m - 1).bit_length(), "n": n, "k": k, "group": group, "dtype": str(dtype).removeprefix("torch.")}


def choose_config(
    arch: int, arch_key: str, bits: int, dtype: torch.dtype, m: int, n: int, k: int, group: int, packed: bool
) -> Config:
    """The configuration to run: a stored plan where there is a usable one, else the heuristic.

    Args:
        arch_key: what plans for this device are kept under.
        dtype: of the activations.
        arch, bits, m, n, k, group, packed: as for :func:`candidates`.
    """
    stored = PLANS.lookup(*plan_op(bits), arch_key, plan_shape(dtype, m, n, k, group))
    if stored is not None and (config := _planned(arch, bits, tuple(stored.items()), m, n, k, group, packed)):
        return config
    return heuristic(arch, bits, m, n, k, group, packed)


@functools.lru_cache(maxsize=4096)
def _planned(
    arch: int, bits: int, stored: tuple[tuple[str, object], ...], m: int, n: int, k: int, group: int, packed: bool
) -> Config | None:
    return next((c for c in candidates(arch, bits, m, n, k, group, packed) if asdict(c) == dict(stored)), None)
