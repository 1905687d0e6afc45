"""KernelgraftQoQConfig: found by config.json alone, which layers it takes, and what is said about the others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_vllm.qoq import KernelgraftQoQConfig
from kernelgraft_vllm.qoq_linear import KernelgraftQoQLinearMethod

GOOD = Qoq(4, 128, zero_form="post", kv_bits=4, kv_smooth=True).config(["lm_head"])


def layer_of(kind: type) -> torch.nn.Module:
    """A layer that nothing was built in: choosing a method looks at the class alone."""
    return kind.__new__(kind)


@pytest.mark.parametrize("layout", [Qoq(4, 64), Qoq(4, -1), Qoq(4, 128, zero_form="post", kv_bits=4, kv_smooth=True)])
def test_reads_what_the_quantizer_writes(layout):
    config = KernelgraftQoQConfig.from_config(layout.config(None))
    assert (config.layout, config.modules_to_not_convert) == (layout, [])
    assert str(layout) in repr(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits = 8, but qoq has 4"),
        ({"act_bits": 16}, "act_bits = 16, expected 8"),
        ({"group_size": 0}, "group_size = 0"),
        ({"zero": None}, "zero = None, expected pre or post"),
        ({"format_version": 2}, "format_version = 2, expected 1"),
        ({"kv": {"bits": 8}}, "kv of 8 bits"),
        ({"kv": 4}, "kv = 4, expected bits and smooth"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert = 'lm_head', expected a list of names"),
        ({"quant_method": "awq", "zero_point": True, "version": "gemm"}, "quant_method = 'awq', expected 'qoq'"),
    ],
)
def test_refuses_what_it_cannot_run_and_names_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        KernelgraftQoQConfig.from_config(GOOD | change)


@pytest.mark.parametrize("named", [None, "qoq", "kernelgraft_awq"])
def test_it_takes_no_other_checkpoint_over(named):
    for method in ("awq", "gptq", "qoq"):
        assert KernelgraftQoQConfig.override_quantization_method({"quant_method": method}, named) is None


def test_vllm_does_not_take_its_note_on_the_cache_for_an_order():
    """``kv_cache_scheme`` would make vLLM store keys and values as fp8."""
    assert getattr(KernelgraftQoQConfig.from_config(GOOD), "kv_cache_scheme", None) is None


def test_linear_layers_are_taken_and_the_rest_of_the_model_is_left_to_vllm():
    config = KernelgraftQoQConfig.from_config(GOOD | {"modules_to_not_convert": ["mlp.gate"]})
    taken = config.get_quant_method(layer_of(LinearBase), "model.layers.0.mlp.down_proj")
    assert isinstance(taken, KernelgraftQoQLinearMethod)
    left = config.get_quant_method(layer_of(LinearBase), "model.layers.0.mlp.gate")
    assert isinstance(left, UnquantizedLinearMethod)
    for kind in (VocabParallelEmbedding, ParallelLMHead, torch.nn.Module):
        assert config.get_quant_method(layer_of(kind), "lm_head") is None


def test_experts_are_refused_by_name_unless_they_are_in_floating_point():
    name = "model.layers.0.mlp.experts"
    with pytest.raises(NotImplementedError, match=rf"{name}: experts with weights of 4 .* not written for vLLM"):
        KernelgraftQoQConfig.from_config(GOOD).get_quant_method(layer_of(RoutedExperts), name)
    listed = KernelgraftQoQConfig.from_config(GOOD | {"modules_to_not_convert": ["experts"]})
    assert listed.get_quant_method(layer_of(RoutedExperts), name) is None


def test_layers_that_the_config_does_not_list_are_found_in_the_weights(tiny_qoq_llama):
    config = KernelgraftQoQConfig(Qoq(4, 64))
    config.maybe_update_config(str(tiny_qoq_llama.quantized))
    assert "lm_head" in config.modules_to_not_convert
    assert not any("proj" in name for name in config.modules_to_not_convert)
