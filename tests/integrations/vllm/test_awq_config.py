"""KernelgraftAWQConfig: which checkpoints and which of their layers are taken, and what is said about the others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from kernelgraft_vllm.awq import KernelgraftAWQConfig

GOOD = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def layer_of(kind: type) -> torch.nn.Module:
    """A layer that nothing was built in: choosing a method looks at the class alone."""
    return kind.__new__(kind)


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in GOOD.items() if name != key}


def test_reads_what_autoawq_and_transformers_write():
    config = KernelgraftAWQConfig.from_config(GOOD | {"modules_to_not_convert": None, "lm_head": False})
    assert (config.group_size, config.modules_to_not_convert) == (128, [])
    config = KernelgraftAWQConfig.from_config(without("version") | {"format": "gemm", "group_size": -1})
    assert config.group_size == -1


def test_reads_the_older_key_names_of_a_file_beside_the_config():
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert KernelgraftAWQConfig.from_config(old).group_size == 64
    assert "quant_config.json" in KernelgraftAWQConfig.get_config_filenames()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(GOOD | {"bits": 8}, r"bits = 8; kernelgraft_awq supports 4 only", id="8-bit"),
        pytest.param(GOOD | {"bits": "4"}, r"bits = '4'", id="bits-as-text"),
        pytest.param(GOOD | {"version": "gemv"}, r"version = 'gemv'; kernelgraft_awq supports 'gemm' only", id="gemv"),
        pytest.param(GOOD | {"version": "gemv_fast"}, r"version = 'gemv_fast'", id="gemv-fast"),
        pytest.param(GOOD | {"version": None}, r"version = None", id="no-version"),
        pytest.param(GOOD | {"zero_point": False}, r"zero_point = False; .* supports True only", id="symmetric"),
        pytest.param(GOOD | {"lm_head": True}, r"lm_head = True", id="quantized-head"),
        pytest.param(GOOD | {"quant_method": "gptq"}, r"quant_method = 'gptq'; .* supports 'awq' only", id="gptq"),
        pytest.param(GOOD | {"group_size": 0}, r"group_size = 0; .* multiples of 8, and -1", id="group-0"),
        pytest.param(GOOD | {"group_size": 100}, r"group_size = 100", id="group-100"),
        pytest.param(GOOD | {"group_size": True}, r"group_size = True", id="group-true"),
        pytest.param(without("group_size"), r"no group_size or q_group_size: it holds \['bits'", id="no-group"),
        pytest.param(GOOD | {"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert = 'lm_head'", id="text"),
        pytest.param({}, r"no bits or w_bit: it holds \[\]", id="empty"),
    ],
)
def test_refuses_what_it_cannot_run_and_names_the_value(config, message):
    with pytest.raises(ValueError, match=message):
        KernelgraftAWQConfig.from_config(config)


@pytest.mark.parametrize(
    ("method", "named", "taken"),
    [
        ("awq", "kernelgraft_awq", "kernelgraft_awq"),
        ("AWQ", "kernelgraft_awq", "kernelgraft_awq"),
        ("awq", None, None),
        ("awq", "awq", None),
        ("awq", "awq_marlin", None),
        ("gptq", "kernelgraft_awq", None),
        ("", "kernelgraft_awq", None),
    ],
)
def test_a_checkpoint_is_taken_over_only_from_a_user_who_says_so(method, named, taken):
    override = KernelgraftAWQConfig.override_quantization_method
    assert override({"quant_method": method}, named, hf_config=None) == taken


def test_linear_layers_are_taken_and_the_rest_of_the_model_is_left_to_vllm():
    from kernelgraft_vllm.awq_linear import KernelgraftAWQLinearMethod

    config = KernelgraftAWQConfig(128)
    taken = config.get_quant_method(layer_of(LinearBase), "model.layers.0.mlp.down_proj")
    assert isinstance(taken, KernelgraftAWQLinearMethod)
    for kind in (VocabParallelEmbedding, ParallelLMHead, torch.nn.Module):
        assert config.get_quant_method(layer_of(kind), "lm_head") is None


def test_layers_kept_in_floating_point_are_found_under_their_fused_and_mapped_names():
    config = KernelgraftAWQConfig.from_config(GOOD | {"modules_to_not_convert": ["visual", "layers.3.self_attn"]})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"visual": "vision_tower"}))
    skipped = {
        name: isinstance(config.get_quant_method(layer_of(LinearBase), name), UnquantizedLinearMethod)
        for name in ("vision_tower.blocks.0.qkv_proj", "model.layers.3.self_attn.qkv_proj", "model.layers.4.mlp.up")
    }
    assert list(skipped.values()) == [True, True, False]


def test_a_fused_layer_that_is_quantized_in_part_is_refused():
    config = KernelgraftAWQConfig(128, ["q_proj"])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"self_attn\.qkv_proj"):
        config.get_quant_method(layer_of(LinearBase), "model.layers.0.self_attn.qkv_proj")


def test_layers_that_the_config_does_not_list_are_found_in_the_weights(tiny_llama):
    config = KernelgraftAWQConfig(64)
    config.maybe_update_config(str(tiny_llama.quantized))
    assert "lm_head" in config.modules_to_not_convert
    assert "model.layers.1.input_layernorm" in config.modules_to_not_convert
    assert not any("proj" in name for name in config.modules_to_not_convert)

    listed = KernelgraftAWQConfig(64, ["visual", "lm_head"])
    listed.maybe_update_config(str(tiny_llama.quantized))
    assert listed.modules_to_not_convert[:2] == ["visual", "lm_head"]
    assert sorted(listed.modules_to_not_convert) == sorted([*config.modules_to_not_convert, "visual"])


def test_a_router_called_gate_does_not_take_the_gate_projections_with_it():
    config = KernelgraftAWQConfig(64, ["gate"])
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    router, projections = (
        config.get_quant_method(layer_of(LinearBase), f"model.layers.0.mlp.{name}")
        for name in ("gate", "shared_expert.gate_up_proj")
    )
    assert isinstance(router, UnquantizedLinearMethod)
    assert not isinstance(projections, UnquantizedLinearMethod)


@pytest.mark.parametrize("listed", ["experts", "model.layers.0.mlp.experts.3.up_proj"])
def test_experts_in_floating_point_are_left_to_vllm(listed):
    experts = layer_of(RoutedExperts)
    assert KernelgraftAWQConfig(128, [listed]).get_quant_method(experts, "model.layers.0.mlp.experts") is None
