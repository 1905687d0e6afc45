"""quantize_awq on a random Llama: packed weights and model agree, scales change nothing, and errors are as reported."""

from dataclasses import replace

import pytest
import torch

from kernelgraft_core.quant import group_statistics
from kernelgraft_core.quant.awq import (
    AwqConfig,
    awq_gptq_config,
    gptq_config,
    quantize_awq,
    rtn_config,
)
from kernelgraft_core.quant.awq.grids import GridSearch
from kernelgraft_core.quant.rounding import Scheme, fake_quantize
from kernelgraft_core.runtime.errors import NonFiniteError

transformers = pytest.importorskip("transformers")

BLOCKS, HIDDEN, INNER = 2, 64, 128
LAYERS = {
    f"model.layers.{index}.{name}"
    for index in range(BLOCKS)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip
W4 = Scheme(4, 32)
SCHEMES = [
    W4,
    Scheme(4, 64, symmetric=True),
    Scheme(4, -1),
    Scheme(3, 32),
    Scheme(3, 64, symmetric=True),
    Scheme(3, -1),
]
CONFIG = AwqConfig(W4, search_tokens=64)


def llama(kv_heads=2, dtype=torch.float32, **options):
    """Two random blocks; a few channels of every norm are large, as they are in real models."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=64, initializer_range=0.125, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[[3, 40]] = 12
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def batches(count=4, length=24):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 100, (1, length), generator=generator) for _ in range(count)]


def quantize(model, config=CONFIG):
    """All blocks: weights by name, and reports."""
    results = list(quantize_awq(model, batches(), config))
    assert [(r.index, r.count) for r in results] == [(i, BLOCKS) for i in range(BLOCKS)]
    weights = {name: weight for result in results for name, weight in result.outcome.weights.items()}
    return weights, [report for result in results for report in result.outcome.reports]


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=batch).logits for batch in batches(2)])


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_scales_alone_leave_the_logits_unchanged(monkeypatch, kv_heads, biases, dtype, tolerance):
    class Unrounded:
        """Search and folding stay as they are; what is put back at the end is the scaled weight itself."""

        def __init__(self, groups, grid):
            self._groups, self._grid = groups, grid

        def __getattr__(self, name):
            return getattr(self._grid, name)

        def values(self, integers):
            return self._groups.clone()

    run = GridSearch.run

    def keep_groups(search, groups, *args, **options):
        grid, integers = run(search, groups, *args, **options)
        return Unrounded(groups, grid), integers

    monkeypatch.setattr(GridSearch, "run", keep_groups)
    model = llama(kv_heads, dtype, attention_bias=biases, mlp_bias=biases)
    before, norm = logits(model), model.model.layers[1].input_layernorm.weight.clone()

    _, reports = quantize(model, AwqConfig(W4, clip_steps=0, search_tokens=64))

    assert sum(report.form != "identity" for report in reports) >= len(LAYERS) // 2
    assert not torch.equal(model.model.layers[1].input_layernorm.weight, norm)
    assert (logits(model) - before).abs().max() < tolerance * before.abs().max()


def values_of(weight):
    """What a packed weight stands for, by its definition."""
    q = weight.integers().float().view(*weight.scales.shape, -1)
    return ((q - weight.zeros.float().unsqueeze(-1)) * weight.scales.float().unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rtn", [False, True], ids=["awq", "rtn"])
def test_the_model_computes_what_the_packed_weights_stand_for(scheme, rtn):
    model = llama()
    weights, reports = quantize(model, rtn_config(scheme) if rtn else AwqConfig(scheme, search_tokens=64))
    assert weights.keys() == {report.name for report in reports} == LAYERS
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert weight.bits == scheme.bits
        assert weight.group_size == (layer.in_features if scheme.group_size == -1 else scheme.group_size)
        assert torch.equal(values_of(weight), layer.weight)
        if scheme.symmetric:
            assert (weight.zeros == scheme.middle).all()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_searches_it_is_round_to_nearest(scheme):
    model, original = llama(), llama()
    weights, reports = quantize(model, rtn_config(scheme))
    for name in weights:
        assert torch.equal(model.get_submodule(name).weight, fake_quantize(original.get_submodule(name).weight, scheme))
    untouched = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in weights}
    assert all(torch.equal(t, original.state_dict()[n]) for n, t in untouched.items())
    assert all((r.form, r.exponent) == ("identity", 0.0) for r in reports)
    assert all(r.error_after == r.error_before > 0 for r in reports)


def test_the_searches_lower_the_errors_they_report():
    _, reports = quantize(llama())
    assert sum(r.error_after for r in reports) < 0.8 * sum(r.error_before for r in reports)
    assert all(0 < r.error_after < 1 for r in reports)


def error_of_output(x, changed, weight):
    """Squared error of the output relative to its own square."""
    error, whole = ((x.double() @ w.double().T).square().sum() for w in (changed - weight, weight))
    return float(error / whole)


@torch.no_grad()
@pytest.mark.parametrize("index", range(BLOCKS))
def test_the_reported_errors_are_those_on_what_the_quantized_blocks_before_produce(index):
    model, original = llama(), llama()
    reports = {report.name: report for report in quantize(model)[1]}
    (block, plain), seen = (m.model.layers[index] for m in (model, original)), []
    hook = block.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in batches():
        model(input_ids=batch)
    hook.remove()
    scales = plain.input_layernorm.weight / block.input_layernorm.weight
    assert (scales != 1).any()
    for name in ("q_proj", "k_proj", "v_proj"):
        x, weight = torch.cat(seen), plain.self_attn.get_submodule(name).weight
        found = reports[f"model.layers.{index}.self_attn.{name}"]
        before = error_of_output(x * scales, fake_quantize(weight, W4), weight)
        after = error_of_output(x, block.self_attn.get_submodule(name).weight, weight * scales)
        assert found.error_before == pytest.approx(before, rel=1e-3)
        assert found.error_after == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("scheme", [W4, Scheme(4, 32, symmetric=True), Scheme(3, 32)], ids=str)
def test_the_quantized_model_is_nearer_to_the_original_than_with_plain_rounding(scheme):
    wanted, errors = logits(llama()), {}
    for name, config in {"rtn": rtn_config(scheme), "awq": AwqConfig(scheme, search_tokens=64)}.items():
        model = llama()
        quantize(model, config)
        errors[name] = float((logits(model) - wanted).square().mean())
    assert errors["awq"] < 0.7 * errors["rtn"]


def test_queries_and_keys_are_not_clipped_when_that_is_asked_for():
    """Their range is that of the scaled weight, so that no weight moves more than half a step."""
    model = llama()
    weights, reports = quantize(model, AwqConfig(W4, scale_points=0, clip_all=False))
    original = llama()
    for report in reports:
        weight, layer = weights[report.name], original.get_submodule(report.name)
        moved = (model.get_submodule(report.name).weight - layer.weight).abs()
        steps = (moved / weight.scales.float().repeat_interleave(32, 1)).max()
        assert (steps < 0.51) == report.name.endswith(("q_proj", "k_proj"))


@pytest.mark.parametrize(("kv_heads", "scaled"), [(4, True), (2, False), (1, False)])
def test_value_heads_that_are_shared_are_not_scaled(kv_heads, scaled):
    _, reports = quantize(llama(kv_heads))
    forms = [r.form for r in reports if r.name.endswith("o_proj")]
    assert (forms != ["identity"] * BLOCKS) == scaled


def test_the_same_input_gives_the_same_bits():
    first, second = quantize(llama())[0], quantize(llama())[0]
    for name, weight in first.items():
        assert all(map(torch.equal, weight.tensors, second[name].tensors))


@pytest.mark.parametrize(
    ("norm", "layer"), [("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_layer(norm, layer, value):
    model = llama()
    model.model.layers[1].get_submodule(norm).weight.data[7] = value
    with pytest.raises(NonFiniteError, match=rf"activations of model\.layers\.1\.{layer} are not finite in 1 of 64"):
        quantize(model)


@pytest.mark.parametrize("change", [{"clip_steps": -1}, {"refine_sweeps": -2}, {"rounding": "up"}], ids=str)
def test_settings_out_of_range_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        AwqConfig(W4, **change)


@pytest.mark.parametrize("recipe", [AwqConfig, awq_gptq_config, gptq_config], ids=["awq", "awq+gptq", "gptq"])
def test_statistics_that_do_not_fit_together_take_more_passes(monkeypatch, recipe):
    """Each group sees what the groups before it, already rounded, produce; the packed weights agree with the model."""
    monkeypatch.setattr(group_statistics, "MOMENTS_LIMIT", 1)
    wanted, model = logits(llama()), llama()
    weights, reports = quantize(model, replace(recipe(W4), search_tokens=64))
    assert weights.keys() == LAYERS
    assert all(torch.equal(values_of(weight), model.get_submodule(name).weight) for name, weight in weights.items())
    plain = llama()
    quantize(plain, rtn_config(W4))
    errors = [float((logits(m) - wanted).square().mean()) for m in (model, plain)]
    assert errors[0] < 0.7 * errors[1]
    assert all(report.error_after < report.error_before for report in reports)


def test_the_rounding_of_gptq_improves_on_awq():
    wanted, errors = logits(llama()), {}
    for name, config in {"awq": AwqConfig, "awq+gptq": awq_gptq_config}.items():
        model = llama()
        quantize(model, replace(config(Scheme(3, 32)), search_tokens=64))
        errors[name] = float((logits(model) - wanted).square().mean())
    assert errors["awq+gptq"] < errors["awq"]
