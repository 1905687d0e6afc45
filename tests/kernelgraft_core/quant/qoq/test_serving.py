"""Blocks that compute as they will be served: what layers and attention read is on the grids of int8 and KV4."""

import pytest
import torch

from kernelgraft_core.quant.architectures import find_architecture
from kernelgraft_core.quant.kv4 import dequantize_kv, quantize_kv
from kernelgraft_core.quant.qoq import as_served
from kernelgraft_core.quant.sequential import watch_inputs
from kernelgraft_core.quant.w4a8.reference import quantize_activation
from kernelgraft_core.runtime.errors import UnsupportedModelError

transformers = pytest.importorskip("transformers")

SETTINGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.125, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 100, (2, 12))


@torch.no_grad()
def run(model, ids, *, blocks=None, **settings):
    """Logits, the inputs of linear layers by name, and the keys and values that attention got."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    seen, attended = {}, []
    plain = torch.nn.functional.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is plain:
                attended.append(args[1:3])
            return func(*args, **(kwargs or {}))

    # Modes nest: what the inner one passes on is what the outer one sees.
    blocks = list(model.model.layers) if blocks is None else blocks
    with Watch(), as_served(find_architecture(model), blocks, **settings), watch_inputs(layers, seen.__setitem__):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits, seen, attended


def on_int8(x):
    q, scale, _ = quantize_activation(x)
    return torch.allclose(q * scale.unsqueeze(-1), x, rtol=1e-5, atol=1e-7)


def through_kv4(x):
    return torch.allclose(dequantize_kv(*quantize_kv(x), x.dtype), x, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("activations", "cache"), SETTINGS)
def test_what_layers_and_attention_read_is_rounded(model, ids, activations, cache):
    _, seen, attended = run(model, ids, activations=activations, cache=cache)
    inside = {name: x for name, x in seen.items() if name != "lm_head"}
    assert len(inside) == 14
    assert all(on_int8(x) == activations for x in inside.values())
    assert not on_int8(seen["lm_head"])
    assert len(attended) == 2
    assert all(through_kv4(x) == cache for pair in attended for x in pair)
    by_token = [row for pair in attended for x in pair for row in x.flatten(0, -2)]
    assert all(len(row.unique()) <= 16 for row in by_token) == cache


def test_values_are_those_of_the_ops(model, ids):
    """One layer by hand: the first block's queries read exactly what the op for activations gives."""
    block = model.model.layers[0]
    with torch.no_grad():
        normed = block.input_layernorm(model.model.embed_tokens(ids))
    q, scale, _ = quantize_activation(normed)
    _, seen, _ = run(model, ids, cache=False)
    assert torch.equal(seen["model.layers.0.self_attn.q_proj"], q * scale.unsqueeze(-1))


def test_afterwards_everything_is_as_before(model, ids):
    wanted = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(run(model, ids)[0], wanted)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    with pytest.raises(KeyError), as_served(find_architecture(model), model.model.layers):
        raise KeyError
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    with pytest.raises(TypeError), as_served(find_architecture(model), model.model.layers):
        model.model.layers[0]()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)


def test_attention_outside_of_the_blocks_is_left_alone(model, ids):
    _, _, attended = run(model, ids, blocks=[model.model.layers[1]])
    assert [all(map(through_kv4, pair)) for pair in attended] == [False, True]
    x = torch.randn(1, 2, 8, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    with as_served(find_architecture(model), model.model.layers):
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(x, x, x), wanted)


def test_keys_may_be_named(model):
    class Named(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(value=x, query=x, key=x, is_causal=True)

    x, block = torch.randn(1, 2, 8, 16), Named()
    rounded = dequantize_kv(*quantize_kv(x), x.dtype)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, rounded, rounded, is_causal=True)
    with as_served(find_architecture(model), [block], activations=False):
        assert torch.equal(block(x), wanted)


def test_attention_that_is_not_met_is_refused(model, ids):
    model.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedModelError, match=r"Llama blocks did not call scaled_dot_product.*cache_bits=None"):
        run(model, ids)
    run(model, ids, cache=False)


def test_experts_are_met_too(ids):
    config = transformers.MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    find_architecture(model).prepare(model.model.layers[0])
    _, seen, _ = run(model, ids)
    experts = [x for name, x in seen.items() if ".experts." in name]
    assert len(experts) >= 3
    assert all(map(on_int8, experts))
    assert not on_int8(seen["lm_head"])


def test_tokens_that_are_not_finite_stay_so(model, ids):
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 5]] = torch.nan
    assert run(model, ids)[0][0, 5:].isnan().all()
