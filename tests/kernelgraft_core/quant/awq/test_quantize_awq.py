"""quantize_awq on a random Llama: packed weights and model agree, scales change nothing, bad input changes nothing."""

import copy
from itertools import islice

import pytest
import torch

from kernelgraft_core.quant.awq import AwqConfig, algorithm, quantize_awq
from kernelgraft_core.quant.rounding import Grid, fake_quantize
from kernelgraft_core.quant.w4a16 import dequantize_w4a16
from kernelgraft_core.runtime.errors import NonFiniteError, UnsupportedModelError

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
CONFIG = AwqConfig(group_size=32, search_tokens=64)
RTN = AwqConfig(group_size=32, scale_points=0, clip_steps=0)


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
    weights = {name: weight for result in results for name, weight in result.weights.items()}
    return weights, [report for result in results for report in result.reports]


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=batch).logits for batch in batches(2)])


def state_of(model):
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_scales_alone_leave_the_logits_unchanged(monkeypatch, kv_heads, biases, dtype, tolerance):
    class Unrounded(Grid):
        """Search and folding stay as they are; what is put back at the end is the scaled weight itself."""

        def reproduce(self, groups):
            return groups.clone()

    monkeypatch.setattr(algorithm, "Grid", Unrounded)
    monkeypatch.setattr(algorithm, "output_error", lambda *_: 0.0)  # its moments are float32
    model = llama(kv_heads, dtype, attention_bias=biases, mlp_bias=biases)
    before, norm = logits(model), model.model.layers[1].input_layernorm.weight.clone()

    _, reports = quantize(model, AwqConfig(group_size=32, clip_steps=0, search_tokens=64))

    assert sum(report.form != "identity" for report in reports) >= len(LAYERS) // 2
    assert not torch.equal(model.model.layers[1].input_layernorm.weight, norm)
    assert (logits(model) - before).abs().max() < tolerance * before.abs().max()


@pytest.mark.parametrize("config", [CONFIG, RTN], ids=["awq", "rtn"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_the_model_computes_what_the_packed_weights_stand_for(config, group_size):
    model = llama()
    config = AwqConfig(group_size, config.scale_points, config.clip_steps, 64)
    weights, reports = quantize(model, config)
    assert weights.keys() == {report.name for report in reports} == LAYERS
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert weight.group_size == (layer.in_features if group_size == -1 else group_size)
        assert torch.equal(dequantize_w4a16(weight.qweight, weight.scales, weight.zeros, torch.float32), layer.weight)
    assert logits(model).isfinite().all()


def test_without_searches_it_is_round_to_nearest():
    model, original = llama(), llama()
    weights, reports = quantize(model, RTN)
    for name in weights:
        assert torch.equal(model.get_submodule(name).weight, fake_quantize(original.get_submodule(name).weight, 32))
    untouched = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in weights}
    assert all(torch.equal(t, original.state_dict()[n]) for n, t in untouched.items())
    assert all((r.form, r.exponent) == ("identity", 0.0) for r in reports)
    assert all(r.error_after == r.error_before > 0 for r in reports)


def test_the_searches_lower_the_errors_they_report():
    _, reports = quantize(llama())
    clipped = [r for r in reports if not r.name.endswith(("q_proj", "k_proj"))]
    assert sum(r.error_after for r in clipped) < 0.8 * sum(r.error_before for r in clipped)
    assert all(0 < r.error_after < 1 for r in reports)


def error_of_groups(x, changed, weight):
    """Squared error of the output relative to its own square, every group of inputs by itself."""
    x, change, weight = (t.double().unflatten(-1, (-1, 32)) for t in (x, changed - weight, weight))
    error, whole = (torch.einsum("tgi,ngi->tng", x, w).square().sum() for w in (change, weight))
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
        before = error_of_groups(x * scales, fake_quantize(weight, 32), weight)
        after = error_of_groups(x, block.self_attn.get_submodule(name).weight, weight * scales)
        assert found.error_before == pytest.approx(before, rel=1e-3)
        assert found.error_after == pytest.approx(after, rel=1e-3)


def test_the_quantized_model_is_nearer_to_the_original_than_with_plain_rounding():
    wanted, errors = logits(llama()), {}
    for name, config in {"rtn": RTN, "awq": CONFIG}.items():
        model = llama()
        quantize(model, config)
        errors[name] = float((logits(model) - wanted).square().mean())
    assert errors["awq"] < 0.7 * errors["rtn"]


def test_queries_and_keys_are_not_clipped():
    """Their range is that of the scaled weight, so that no weight moves more than half a step."""
    model = llama()
    weights, reports = quantize(model, AwqConfig(group_size=32, scale_points=0))
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
        for part in ("qweight", "scales", "zeros"):
            assert torch.equal(getattr(weight, part), getattr(second[name], part))


def test_blocks_come_one_at_a_time():
    model, original = llama(), llama()
    next(iter(quantize_awq(model, batches(), CONFIG)))
    assert_unchanged(model.model.layers[1], state_of(original.model.layers[1]))
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_name_the_layer_before_anything_changes(value):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3:5] = value
    before = state_of(model)
    message = rf"weights of model\.layers\.1\.mlp\.up_proj are not finite in 2 of {HIDDEN * INNER} places"
    with pytest.raises(NonFiniteError, match=message):
        quantize(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("norm", "layer"), [("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_layer(norm, layer, value):
    model = llama()
    model.model.layers[1].get_submodule(norm).weight.data[7] = value
    with pytest.raises(NonFiniteError, match=rf"activations of model\.layers\.1\.{layer} are not finite in 1 of 64"):
        quantize(model)


@pytest.mark.parametrize("group_size", [48, 128, 0])
def test_a_group_size_that_does_not_divide_is_refused_before_anything_changes(group_size):
    model = llama()
    before = state_of(model)
    message = rf"model\.layers\.0\.self_attn\.q_proj: group size {group_size} does not divide K = 64"
    with pytest.raises(ValueError, match=message):
        quantize(model, AwqConfig(group_size=group_size))
    assert_unchanged(model, before)


def test_a_group_size_that_only_a_later_layer_refuses_is_refused_as_early():
    model = llama()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(100, HIDDEN)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: group size 32 does not divide K = 100"):
        quantize(model)
    assert_unchanged(model, before)


def test_a_model_of_another_family_is_refused_with_the_known_ones():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=10, n_positions=8)
    )
    with pytest.raises(UnsupportedModelError, match="model type 'gpt2'; known: llama, mistral"):
        quantize(model)


def test_a_model_that_is_quantized_already_is_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj of LlamaDecoderLayer is Identity, expected Linear"):
        quantize(model)


def test_no_batches_are_refused():
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match="no calibration batches were given"):
        list(islice(quantize_awq(model, [], CONFIG), 1))
    assert_unchanged(model, before)
