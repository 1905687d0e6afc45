"""GPTQ over the blocks of a random Llama."""

import pytest
import torch

from kernelgraft_core.quant.awq import gptq_config, quantize_awq
from kernelgraft_core.quant.rounding import Scheme

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32), Scheme(4, 32, True)], ids=str)
def test_a_model_computes_what_its_packed_weights_stand_for(scheme):
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.125,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    norms = [p for name, p in model.named_parameters() if "layernorm" in name]
    for norm in norms:
        norm.data[[3, 40]] = 12
    before = [norm.clone() for norm in norms]
    batches = [torch.randint(0, 100, (1, 24)) for _ in range(6)]
    results = list(quantize_awq(model, batches, gptq_config(scheme)))
    weights = {name: weight for result in results for name, weight in result.outcome.weights.items()}
    assert len(weights) == 14
    for name, weight in weights.items():
        stored = weight.integers().view(*weight.scales.shape, -1).float() - weight.zeros.float().unsqueeze(-1)
        layer = model.get_submodule(name).weight
        assert weight.bits == scheme.bits
        assert torch.equal((stored * weight.scales.float().unsqueeze(-1)).view_as(layer), layer)
    reports = [report for result in results for report in result.outcome.reports]
    assert all(report.error_after < report.error_before for report in reports)
    assert all(torch.equal(a, b) for a, b in zip(norms, before, strict=True))
