"""QoQCache in generate(): 4 bits for what was stored, the model's own attention for everything else."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig

import kernelgraft
from kernelgraft_core.quant.kv4 import dequantize_kv, quantize_kv
from kernelgraft_transformers.qoq_cache import QoQCache, QoQLayer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 256,
}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model_of(kind, dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | more)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def model(request):
    more = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return model_of(request.param, **more if request.param == "gemma3_text" else {})


def stored(x):
    return dequantize_kv(*quantize_kv(x), x.dtype)


class Rounding(DynamicCache):
    """By definition: keys and values as they are for tokens of the same pass, and as they were stored for others."""

    def update(self, key, value, layer, *args, **kwargs):
        before = self.get_seq_length(layer)
        keys, values = super().update(key, value, layer, *args, **kwargs)
        return tuple(torch.cat((stored(x[:, :, :before]), x[:, :, before:]), 2) for x in (keys, values))


def definition():
    return Rounding()  # without a config: sliding layers keep all tokens too


@torch.no_grad()
def logits_in_passes(model, cache, ids, passes):
    found, start = [], 0
    for size in passes:
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        found.append(out.logits)
        start += size
    return torch.cat(found, 1)


@pytest.mark.parametrize("passes", [[20], [1] * 20, [7, 1, 1, 11]], ids=["whole", "token by token", "chunks"])
@pytest.mark.parametrize("room", [None, 20, 64])
def test_tokens_see_what_was_stored_in_4_bits(model, passes, room):
    ids = torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    cache = QoQCache(model.config, max_cache_len=room)
    found = logits_in_passes(model, cache, ids, passes)
    torch.testing.assert_close(found, logits_in_passes(model, definition(), ids, passes), rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20
    plain = logits_in_passes(model, DynamicCache(), ids, passes)
    assert torch.equal(found, plain) == (len(passes) == 1)


def test_it_generates_as_by_definition_and_padding_changes_nothing(model):
    ids = torch.randint(2, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    alone = model.generate(ids, max_new_tokens=8, past_key_values=QoQCache(model.config), **GREEDY)
    assert torch.equal(alone, model.generate(ids, max_new_tokens=8, past_key_values=definition(), **GREEDY))
    batch = torch.zeros(2, 12, dtype=torch.long)
    batch[0, 3:], batch[1] = ids[0], torch.arange(2, 14)
    mask = (batch > 0).long()
    cache = QoQCache(model.config)
    both = model.generate(batch, attention_mask=mask, max_new_tokens=8, past_key_values=cache, **GREEDY)
    assert torch.equal(both[0, 12:], alone[0, 9:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_runs_in_16_bits_and_grows(dtype):
    model = model_of("llama", dtype)
    cache = QoQCache(model.config)
    out = model.generate(torch.arange(2, 40).unsqueeze(0), max_new_tokens=60, past_key_values=cache, **GREEDY)
    assert out.shape == (1, 98)
    assert cache.get_seq_length() == 97  # the last token was not read
    assert cache.layers[0].rows.shape == (1, 2, 128, 16 + 8)
    assert cache.nbytes == 2 * 2 * 128 * 24
    assert cache.nbytes < sum(k.nbytes + v.nbytes for k, v in [(torch.empty(1, 2, 128, 16).half(),) * 2] * 2) / 2


def test_what_does_not_fit_is_refused(model):
    cache = QoQCache(model.config, max_cache_len=10)
    with pytest.raises(ValueError, match="room for max_cache_len = 10 tokens, got 11"):
        logits_in_passes(model, cache, torch.full((1, 11), 3), [11])
    cache = QoQCache(model.config)
    logits_in_passes(model, cache, torch.full((2, 4), 3), [4])
    with pytest.raises(ValueError, match=r"holds \(2, 2\) sequences and heads, got \(3, 2\)"):
        logits_in_passes(model, cache, torch.full((3, 4), 3), [4])
    with pytest.raises(ValueError, match="max_cache_len is 0"):
        QoQCache(model.config, max_cache_len=0)


def test_beam_search_is_refused(model):
    with pytest.raises(NotImplementedError, match="QoQCache does not support beam search"):
        model.generate(
            torch.arange(2, 9).unsqueeze(0),
            num_beams=2,
            max_new_tokens=3,
            past_key_values=QoQCache(model.config),
            **GREEDY,
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "t5 is an encoder-decoder"),
        ("deepseek_v3", "caches latent vectors"),
        ("qwen3_next", "layers of type linear"),
    ],
)
def test_models_without_ordinary_keys_and_values_are_refused(kind, message):
    with pytest.raises(NotImplementedError, match=message):
        QoQCache(AutoConfig.for_model(kind))


def test_tokens_are_forgotten_and_sequences_chosen(model):
    ids = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    cache = QoQCache(model.config)
    logits_in_passes(model, cache, ids, [12])
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    again = logits_in_passes(model, cache, ids[:, 8:], [4])
    fresh = logits_in_passes(model, QoQCache(model.config), ids, [8, 4])[:, 8:]
    torch.testing.assert_close(again, fresh)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    torch.testing.assert_close(
        logits_in_passes(model, copy.deepcopy(cache), ids[:, :1], [1]), logits_in_passes(model, cache, ids[:, :1], [1])
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    fixed = QoQLayer(max_cache_len=5)
    fixed.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    fixed.reset()
    assert (fixed.get_seq_length(), fixed.get_max_length(), fixed.rows.shape[2]) == (0, 5, 5)


def test_keys_and_values_of_different_shapes_are_refused():
    with pytest.raises(NotImplementedError, match=r"keys are \(1, 2, 3, 16\) and values \(1, 2, 3, 8\)"):
        QoQLayer().update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 8))


def test_the_plugin_hands_it_out(model):
    with kernelgraft.load_plugin("qoq", host="transformers") as qoq:
        assert qoq.QoQCache is QoQCache
        config = GenerationConfig(max_new_tokens=3, **GREEDY)
        model.generate(torch.arange(2, 9).unsqueeze(0), config, past_key_values=qoq.QoQCache(model.config))
