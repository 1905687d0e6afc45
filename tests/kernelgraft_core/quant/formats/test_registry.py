"""From quantization_config to layout: what is known is found, what is not is refused by name."""

import copy

import pytest
import torch

from kernelgraft_core.quant.formats.autoawq import Gemm, Gemv
from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.formats.layout import StoredTensor
from kernelgraft_core.quant.formats.llm_awq import LlmAwq
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.runtime.errors import CheckpointError

from .layout_cases import LAYOUTS, random_weight


@pytest.mark.parametrize("size", [64, -1])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "gptqmodel-gemv-fast"])
@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
def test_every_layout_is_found_by_the_config_that_it_writes(name, size, skipped):
    layout = LAYOUTS[name](group_size=size)
    assert find_layout(layout.config(skipped)) == layout


CONFIGS = [
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"}, Gemm(4, 64)),
    ({"quant_method": "awq"}, Gemm(4, 128)),
    ({"zero_point": True, "q_group_size": 32, "w_bit": 4}, Gemm(4, 32)),
    ({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMV"}, Gemv(4, 32)),
    ({"quant_method": "awq", "format": "gemv", "group_size": 64}, Gemv(4, 64)),
    ({"quant_method": "awq", "version": "gemv_fast"}, LlmAwq(4, 128)),
    ({"quant_method": "awq", "version": "gemv", "backend": "llm-awq"}, LlmAwq(4, 128)),
    ({"quant_method": "awq", "version": "llm-awq", "group_size": 64}, LlmAwq(4, 64)),
    ({"quant_method": "kernelgraft_awq", "bits": 3, "group_size": 64, "symmetric": True, "format_version": 1},
     Native(3, 64, True)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "layout"), CONFIGS)
def test_configs_of_other_writers_are_understood(config, layout):
    assert find_layout(config) == layout


@pytest.mark.parametrize("kind", [Gemm, Gemv, LlmAwq])
def test_the_three_layouts_of_llm_awq_are_told_apart_by_their_tensors(kind):
    layout = kind(group_size=64)
    tensors = layout.write(random_weight(layout, 64, 64, 0))
    stored = {f"a.{part}": StoredTensor.of(tensor) for part, tensor in tensors.items()}
    assert find_layout({"quant_method": "awq", "backend": "llm-awq", "group_size": 64}, stored) == layout


def test_gptqmodels_name_of_the_offsets_is_known():
    stored = {
        "a.qweight": StoredTensor(torch.int16, (4, 64)),
        "a.qzeros": StoredTensor(torch.float16, (8, 16)),
        "a.scales": StoredTensor(torch.float16, (8, 16)),
    }
    assert find_layout({"quant_method": "awq", "version": "gemv_fast"}, stored) == LlmAwq(offsets="qzeros")


REFUSED = [
    ({}, "quant_method = None; known are 'awq', 'compressed-tensors', 'kernelgraft_awq'"),
    ({"quant_method": "gptq"}, "quant_method = 'gptq'"),
    ({"quant_method": "awq", "bits": 8}, "bits = 8, but AutoAWQ GEMM has 4"),
    ({"quant_method": "awq", "group_size": 0}, "group_size = 0"),
    ({"quant_method": "awq", "zero_point": False}, "zero_point = False, expected True"),
    ({"quant_method": "awq", "version": "marlin"}, "version = 'marlin', expected gemm, gemv, gemv_fast or llm-awq"),
    ({"quant_method": "kernelgraft_awq", "format_version": 1, "bits": 2}, "bits = 2, but kernelgraft_awq has 3 or 4"),
    ({"quant_method": "kernelgraft_awq"}, "format_version = None, expected 1"),
    ({"quant_method": "kernelgraft_awq", "format_version": 2}, "format_version = 2, expected 1"),
    ({"quant_method": "kernelgraft_awq", "format_version": 1, "symmetric": "yes"}, "symmetric = 'yes'"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_read_is_refused_by_name(config, message):
    with pytest.raises(CheckpointError, match=f"quantization_config has {message}"):
        find_layout(config)


def compressed(group=None, weights=None, **settings):
    """The config that we write, with some of it changed."""
    config = copy.deepcopy(PackQuantized(group_size=128).config(["lm_head"])) | settings
    config["config_groups"]["group_0"] |= group or {}
    config["config_groups"]["group_0"]["weights"] |= weights or {}
    return config


@pytest.mark.parametrize("actorder", [None, "weight", "static", False])
def test_orders_that_leave_columns_in_place_are_fine(actorder):
    assert find_layout(compressed(weights={"actorder": actorder})) == PackQuantized()


def test_other_settings_of_llm_compressor_are_understood():
    config = compressed(weights={"observer": "minmax", "observer_kwargs": {}, "block_structure": None})
    assert find_layout(config) == PackQuantized()
    assert find_layout(compressed(weights={"strategy": "channel", "group_size": None})) == PackQuantized(group_size=-1)
    assert find_layout(compressed({"format": "pack-quantized"}, format="mixed-precision")) == PackQuantized()
    twice = compressed()
    twice["config_groups"]["group_1"] = twice["config_groups"]["group_0"]
    assert find_layout(twice) == PackQuantized()


COMPRESSED_REFUSED = [
    (compressed(weights={"num_bits": 8}), "bits = 8, but compressed-tensors pack-quantized has 4"),
    (compressed(weights={"type": "float"}), "type = 'float' in config_groups.group_0, expected 'int'"),
    (compressed(weights={"actorder": "group"}), "actorder = 'group' in config_groups.group_0"),
    (compressed(weights={"dynamic": True}), "dynamic = True"),
    (compressed(weights={"strategy": "block"}), "strategy = 'block' in config_groups.group_0, expected 'group' or"),
    (compressed(weights={"group_size": None}), "group_size = None"),
    (compressed(format="nvfp4-pack-quantized"), "format = 'nvfp4-pack-quantized'"),
    (compressed({"input_activations": {"num_bits": 8}}), "input_activations in config_groups.group_0"),
    ({"quant_method": "compressed-tensors"}, "config_groups = None"),
    (compressed(kv_cache_scheme={"num_bits": 8}), "a kv_cache_scheme"),
]


@pytest.mark.parametrize(("config", "message"), COMPRESSED_REFUSED)
def test_other_kinds_of_compressed_tensors_are_refused_by_name(config, message):
    with pytest.raises(CheckpointError, match=f"quantization_config has {message}"):
        find_layout(config)


def test_layers_that_are_quantized_differently_are_refused():
    config = compressed()
    config["config_groups"]["group_1"] = compressed(weights={"group_size": 64})["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match="config_groups that differ: group_0, group_1"):
        find_layout(config)
    config["config_groups"]["group_1"] = {"targets": ["Linear"]}
    with pytest.raises(CheckpointError, match=r"no weights in config_groups\.group_1"):
        find_layout(config)
