"""QoQ on a random Llama: packed weights and model agree, errors are as reported, and the steps serve their purpose."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from kernelgraft_core.quant import group_statistics
from kernelgraft_core.quant.architectures import find_architecture
from kernelgraft_core.quant.awq import AwqMethod, rtn_config
from kernelgraft_core.quant.qoq import QoqConfig, QoqMethod, as_served, qoq_config
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.runner import quantize_model
from kernelgraft_core.quant.w4a8.reference import quantize_activation, w4a8_linear
from kernelgraft_core.runtime.errors import NonFiniteError

transformers = pytest.importorskip("transformers")

BLOCKS = 2
LAYERS = {
    f"model.layers.{index}.{name}"
    for index in range(BLOCKS)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip
G32, ROWS = Scheme(4, 32), Scheme(4, -1)
PLAIN = {
    "rotate": False, "rotate_heads": False, "smooth_attention": 0.0, "smooth_output": (0.0, 0.0), "reorder": False,
}  # fmt: skip
NEAREST = {"clip_steps": 0, "refine_sweeps": 0, "rounding": "nearest"}


def llama(kv_heads=2):
    """Two random blocks with what makes quantization hard: large norm channels, key channels and inner channels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=64, initializer_range=0.125,
        attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter[[3, 40]] = 12
        if name.endswith("bias"):
            parameter.normal_()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight[[2, 10, 19]] *= 6
        layer.mlp.up_proj.weight[7] *= 30
        layer.mlp.down_proj.weight[:, 7] /= 10
    return model


def batches(count=6, length=24):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 100, (1, length), generator=generator) for _ in range(count)]


def quantize(model, config):
    results = list(quantize_model(model, batches(), QoqMethod(config), scheme_group_size=config.scheme.group_size))
    assert [(r.index, r.count) for r in results] == [(i, BLOCKS) for i in range(BLOCKS)]
    weights = {name: weight for result in results for name, weight in result.outcome.weights.items()}
    return weights, [report for result in results for report in result.outcome.reports]


@torch.no_grad()
def logits(model, *, activations=False, cache=False):
    with as_served(find_architecture(model), model.model.layers, activations=activations, cache=cache):
        return torch.cat([model(input_ids=batch, use_cache=False).logits for batch in batches(2)])


CONFIGS = [
    qoq_config(G32),
    qoq_config(ROWS),
    replace(qoq_config(G32), zero="post"),
    replace(qoq_config(Scheme(4, 16)), rounding="nearest"),
    replace(qoq_config(ROWS), rounding="nearest", refine_sweeps=0),
    replace(qoq_config(G32), **PLAIN, **NEAREST),
    replace(qoq_config(G32), activation_bits=None, cache_bits=None),
    replace(qoq_config(G32), smooth_values=(0.3, 0.7), rotate_heads=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_model_computes_what_the_packed_weights_stand_for(config):
    model = llama()
    weights, reports = quantize(model, config)
    assert weights.keys() == {report.name for report in reports} == LAYERS
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        size = config.scheme.group_size
        assert weight.group_size == (layer.in_features if size == -1 else size)
        assert (weight.zero is None) == (size != -1)
        assert torch.equal(weight.int8().float() * weight.scale.float().unsqueeze(-1), layer.weight)
        assert torch.equal(weight.values(torch.float32), layer.weight)
        assert weight.fits_bytes
        if config.zero == "pre" and weight.group_zero is not None:
            assert not (weight.group_zero % weight.group_scale).any()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("scheme", [G32, ROWS], ids=["groups", "rows"])
def test_a_layer_that_is_served_computes_what_the_kernels_do(scheme):
    model = llama()
    weights, _ = quantize(model, qoq_config(scheme))
    layer = model.model.layers[1].self_attn.q_proj
    x = torch.randn(5, 64)
    q, x_scale, _ = quantize_activation(x)
    wanted = w4a8_linear(x, *weights["model.layers.1.self_attn.q_proj"].tensors, layer.bias)
    torch.testing.assert_close(layer(q * x_scale.unsqueeze(-1)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [G32, ROWS], ids=["groups", "rows"])
def test_the_searches_lower_the_errors_they_report(scheme):
    reports = quantize(llama(), qoq_config(scheme))[1]
    assert all(0 < r.error_after < r.error_before < 1 for r in reports)
    assert sum(r.error_after for r in reports) < 0.6 * sum(r.error_before for r in reports)
    plain = quantize(llama(), replace(qoq_config(scheme), **NEAREST))[1]
    assert all(r.error_after == r.error_before > 0 for r in plain)


@torch.no_grad()
@pytest.mark.parametrize("index", range(BLOCKS))
@pytest.mark.parametrize("served", [True, False])
def test_the_reported_errors_are_those_on_what_the_blocks_before_give_when_they_are_served(index, served):
    """The layers of a block see rounded activations of a block that is rotated but whose weights are not rounded."""
    bits = {} if served else {"activation_bits": None, "cache_bits": None}
    config = replace(qoq_config(G32), **PLAIN | {"rotate": True, "rotate_heads": True}, **bits)
    model, exact = llama(), llama()
    reports = {report.name: report for report in quantize(model, config)[1]}
    quantize(exact, replace(config, weight_bits=None))
    for before in range(index):
        exact.model.layers[before] = model.model.layers[before]
    block, name = exact.model.layers[index], f"model.layers.{index}.mlp.gate_proj"
    seen = []
    with ExitStack() as stack:
        if served:
            stack.enter_context(as_served(find_architecture(exact), exact.model.layers))
        stack.enter_context(block.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])))
        for batch in batches():
            exact(input_ids=batch, use_cache=False)
    x, weight = torch.cat(seen).double(), block.mlp.gate_proj.weight.double()
    change = model.get_submodule(name).weight.double() - weight
    wanted = float((x @ change.T).square().sum() / (x @ weight.T).square().sum())
    assert reports[name].error_after == pytest.approx(wanted, rel=1e-3)


def errors(config, *, activations=True, cache=True):
    """Mean squared error of the logits of the quantized model, served."""
    wanted, model = logits(llama()), llama()
    if isinstance(config, QoqConfig):
        quantize(model, config)
    elif config is not None:
        list(quantize_model(model, batches(), AwqMethod(config), scheme_group_size=config.scheme.group_size))
    return float((logits(model, activations=activations, cache=cache) - wanted).square().mean())


@pytest.mark.parametrize(
    ("step", "rounded"),
    [
        ({"rotate": True}, "activations"),
        ({"smooth_output": (0.9, 0.1)}, "activations"),
        ({"smooth_attention": 0.5}, "cache"),
    ],
    ids=str,
)
def test_each_transform_makes_what_it_is_for_better(step, rounded):
    """Weights as they are: what is left is the error of 8-bit activations, or of 4-bit keys and values."""
    only = {"activations": False, "cache": False} | {rounded: True}
    plain = replace(qoq_config(G32), weight_bits=None, **PLAIN)
    assert errors(replace(plain, **step), **only) < 0.9 * errors(plain, **only)
    assert errors(plain, **only) == errors(None, **only)


@pytest.mark.parametrize("scheme", [G32, ROWS], ids=["groups", "rows"])
def test_everything_together_is_better_than_plain_rounding(scheme):
    assert errors(qoq_config(scheme)) < 0.5 * errors(rtn_config(scheme))


def test_defaults_depend_on_the_variant():
    assert qoq_config(G32) == QoqConfig(G32)
    assert qoq_config(ROWS) == QoqConfig(ROWS, smooth_output=(0.1, 0.9), reorder=False)


def test_the_same_input_gives_the_same_bits():
    first, second = quantize(llama(), qoq_config(G32))[0], quantize(llama(), qoq_config(G32))[0]
    for name, weight in first.items():
        pairs = zip(weight.tensors, second[name].tensors, strict=True)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("scheme", [G32, ROWS], ids=["groups", "rows"])
def test_statistics_that_do_not_fit_together_take_more_passes(monkeypatch, scheme):
    monkeypatch.setattr(group_statistics, "MOMENTS_LIMIT", 1)
    model = llama()
    weights, reports = quantize(model, qoq_config(scheme))
    assert weights.keys() == LAYERS
    for name, weight in weights.items():
        assert torch.equal(weight.values(torch.float32), model.get_submodule(name).weight)
    assert all(report.error_after < report.error_before for report in reports)


@pytest.mark.parametrize(
    ("norm", "layer"), [("input_layernorm", "self_attn.o_proj"), ("post_attention_layernorm", "mlp.down_proj")]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_layer(norm, layer, value):
    model = llama()
    model.model.layers[1].get_submodule(norm).weight[7] = value
    with pytest.raises(NonFiniteError, match=rf"activations of model\.layers\.1\.({layer}|keys) are not finite"):
        quantize(model, replace(qoq_config(G32), rotate=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": Scheme(3, 32)}, "asymmetric weights of 4 bits, not .*bits=3"),
        ({"scheme": Scheme(4, 32, symmetric=True)}, "asymmetric weights of 4 bits, not .*symmetric=True"),
        ({"zero": "none"}, "zero is 'none'"),
        ({"weight_bits": 8}, "weight_bits is 8, expected 4 or None"),
        ({"activation_bits": 4}, "activation_bits is 4, expected 8 or None"),
        ({"cache_bits": 8}, "cache_bits is 8, expected 4 or None"),
        ({"smooth_output": (0.3,)}, "smooth_output is"),
        ({"clip_steps": -1}, "clip_steps is -1"),
        ({"rounding": "up"}, "rounding 'up'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(qoq_config(G32), **change)
