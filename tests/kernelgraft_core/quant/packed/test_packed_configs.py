"""The choice among the GPU kernels for packed weights: a candidate, sensible at both ends, a stored plan's first."""

import pytest
import torch

from kernelgraft_core.quant.packed import triton_configs
from kernelgraft_core.quant.packed.triton_configs import (
    ARCHITECTURES,
    DEQUANTIZE,
    architecture,
    candidates,
    choose_config,
    estimate,
    heuristic,
    list_selectable,
)
from kernelgraft_core.runtime.plans import PlanStore

BITS = pytest.mark.parametrize("bits", [3, 4])
TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 100, 129, 256, 1000, 4096, 50_000)
LAYERS = ((4096, 4096, 128), (37, 32, 32), (576, 1536, 64), (128_256, 4096, 4096))


@BITS
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("n", "k", "group", "packed"), [(36, 4128, 96, True), (37, 1024, 128, False)])
def test_groups_that_straddle_tiles_and_odd_layouts_get_tiles_that_do_not_spill(bits, arch, n, k, group, packed):
    small = list_selectable(arch, ragged=True)
    assert set(small) < set(list_selectable(arch))
    for m in TOKENS:
        config = heuristic(arch, bits, m, n, k, group, packed)
        assert config == DEQUANTIZE or triton_configs.replace(config, splits=1) in small


@BITS
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("n", "k", "group"), LAYERS)
def test_every_shape_has_a_choice_that_is_compiled_ahead_of_time(bits, arch, n, k, group):
    tiles = {(c.kernel, c.block_m, c.block_n, c.block_k, c.warps, c.stages) for c in list_selectable(arch)}
    for m in TOKENS:
        config = heuristic(arch, bits, m, n, k, group)
        assert config in candidates(arch, bits, m, n, k, group)
        tile = (config.kernel, config.block_m, config.block_n, config.block_k, config.warps, config.stages)
        assert config == DEQUANTIZE or tile in tiles


@BITS
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_token_streams_the_weights_and_very_many_leave_the_product_to_cublas(bits, arch):
    assert heuristic(arch, bits, 1, 4096, 4096, 128).kernel == "slice_k"
    assert heuristic(arch, bits, 32, 4096, 4096, 128).kernel == "gemm"
    assert heuristic(arch, bits, 1 << 15, 4096, 4096, 128) == DEQUANTIZE


@BITS
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_estimated_to_beat_the_memory_it_must_read(bits, arch):
    n = k = 8192
    floor = n * k * bits / 8 / (ARCHITECTURES[arch].memory * 1e3)
    for m in TOKENS:
        assert all(estimate(arch, bits, c, m, n, k, 128) > floor for c in candidates(arch, bits, m, n, k, 128))


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), None), ((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 0), 89)],
)
def test_every_supported_gpu_has_an_architecture(capability, arch):
    assert architecture(capability) == arch


@BITS
def test_a_stored_plan_wins_and_a_foreign_one_is_ignored(bits, tmp_path, monkeypatch):
    store = PlanStore(tmp_path, presets=tmp_path)
    monkeypatch.setattr(triton_configs, "PLANS", store)
    shape = (16, 4096, 4096, 128)
    default = choose_config(90, "sm_90", bits, torch.float16, *shape, True)
    other = next(c for c in candidates(90, bits, *shape) if c != default)

    def remember(**changed):
        plan = triton_configs.asdict(other) | changed
        monkeypatch.setattr(store, "lookup", lambda op, *_: plan if op == f"w{bits}a16_linear" else None)

    remember()
    assert choose_config(90, "sm_90", bits, torch.float16, *shape, True) == other
    other_width = 7 - bits
    assert choose_config(90, "sm_90", other_width, torch.float16, *shape, True) == heuristic(90, other_width, *shape)
    remember(block_n=48)
    assert choose_config(90, "sm_90", bits, torch.float16, *shape, True) == default
