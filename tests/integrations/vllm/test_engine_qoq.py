"""Real vLLM engines on QoQ checkpoints and with keys and values in 4 bits, against Transformers.

One process starts all engines. What the cache does to a model is computed here once more, from the definition: which
tokens a token sees in 4 bits depends on the chunks in which the prompt was computed.
"""

from __future__ import annotations

import statistics

import pytest
import torch

import kernelgraft

pytest.importorskip("vllm")
transformers = pytest.importorskip("transformers")

PROMPTS = [[3, 5, 7, 11], [201, 14, 14, 91, 42, 3, 78]]
CHUNK, BLOCK = 32, 16
LONG_PROMPT = [2 + (37 * index) % 251 for index in range(170)]
CROWD = [[2 + (31 * index + 7 * number) % 251 for index in range(40)] for number in range(3)]
CROWD_TOKENS, CROWD_BLOCKS = 40, 14  # the three need 15 blocks at their ends, and one block is never given out
STEPS, LAYERS = 8, 2
TOLERANCE = 5e-3  # the last place of float32 decides now and then to which side something is rounded
NOISE = {"plain": (TOLERANCE, 0.08), "qoq": (0.03, 0.15)}
"""Half of the log-probabilities are closer than the first, all closer than the second: now and then the last place of
float32 decides to which of two steps something is rounded, and float32 and float64 of the definition below are 0.04
apart. With activations of 8 bits the same happens in every layer."""


@pytest.fixture(scope="module")
def session(run_engines, tiny_qoq_llama, tmp_path_factory):
    qoq, plain = ({"model": str(path)} for path in (tiny_qoq_llama.quantized, tiny_qoq_llama.dequantized))
    kv4 = {"kv_cache_dtype": "int4_per_token_head", "block_size": BLOCK}
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK, "enable_prefix_caching": True}
    requests = [{"prompts": prompts} for prompts in (PROMPTS, [LONG_PROMPT], [LONG_PROMPT])]
    runs = {
        "weights": (qoq | chunked, requests),
        "cache": (plain | kv4 | chunked, requests),
        "both": (qoq | kv4 | chunked, requests),
        "compiled": (
            qoq | kv4 | {"enforce_eager": False, "compilation_config": {"backend": "eager"}},
            [{"prompts": PROMPTS}],
        ),
        "crowded": (
            plain
            | kv4
            | {"num_gpu_blocks_override": CROWD_BLOCKS, "max_model_len": 128, "enable_prefix_caching": False},
            [{"prompts": CROWD, "new_tokens": CROWD_TOKENS}],
        ),
    }
    seen = run_engines([{"engine": engine, "requests": asked} for engine, asked in runs.values()])
    return dict(zip(runs, seen, strict=True))


@pytest.fixture(scope="module")
def models(tiny_qoq_llama):
    """The checkpoint and its dequantized weights in Transformers."""
    auto = transformers.AutoModelForCausalLM
    with kernelgraft.load_plugin("qoq", host="transformers"):
        qoq = auto.from_pretrained(tiny_qoq_llama.quantized, dtype=torch.float32)
    return {"qoq": qoq, "plain": auto.from_pretrained(tiny_qoq_llama.dequantized, dtype=torch.float32)}


def through_cache(x):
    """What 4 bits per number, a scale and a lower end per token and head make of ``x`` ``(..., D)``."""
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.amax(-1, keepdim=True) - low) / 15).half().float()
    return ((x - low) / scale).round().clamp(0, 15) * scale + low


class CachedAttention:
    """Attention in which a token sees what was there before its chunk in 4 bits, and the rest as it is.

    Attributes:
        chunk: ``(T,)``, for each token the first one of its chunk.
    """

    def __init__(self):
        self.chunk = torch.zeros(0)

    def __call__(self, module, query, key, value, mask, scaling, **_):
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        place = torch.arange(query.shape[2])
        stored = place < self.chunk.unsqueeze(1)
        scores = torch.where(stored, query @ through_cache(key).mT, query @ key.mT) * scaling
        weights = scores.masked_fill(place > place.unsqueeze(1), -torch.inf).softmax(-1)
        out = (weights * stored) @ through_cache(value) + (weights * ~stored) @ value
        return out.transpose(1, 2), None


@pytest.fixture(scope="module")
def with_cache(models):
    """``with_cache(name)(tokens, chunk)``: log-probabilities ``(T, vocabulary)`` by a model whose cache has 4 bits."""
    attention = CachedAttention()
    transformers.AttentionInterface.register("kv4-definition", attention)

    def choose(name):
        def run(tokens, chunk):
            model, attention.chunk = models[name], torch.tensor(chunk)
            before, model.config._attn_implementation = model.config._attn_implementation, "kv4-definition"
            try:
                with torch.no_grad():
                    return model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            finally:
                model.config._attn_implementation = before

        return run

    return choose


def chunks(prompt, total, computed=0, size=CHUNK, before=()):
    """The chunk of each token: of a prompt of which ``computed`` tokens were there, then one token at a time."""
    own = [computed + (place - computed) // size * size for place in range(computed, prompt)]
    return [*before[:computed], *own, *range(prompt, total)]


def assert_close_to(expected, prompt, tokens, steps, model):
    """``expected`` ``(T, vocabulary)`` for prompt and tokens; the likeliest tokens were taken, and given right."""
    rows = expected[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
    best = rows.topk(2)
    margin = (best.values[:, 0] - best.values[:, 1]).min()
    assert margin > TOLERANCE, "two tokens are too close for this to prove anything: change the seed"
    assert tokens == best.indices[:, 0].tolist()
    off = [abs(row[int(t)].item() - v) for row, found in zip(rows, steps, strict=True) for t, v in found.items()]
    half, largest = NOISE[model]
    assert statistics.median(off) < half
    assert max(off) < largest


def test_a_checkpoint_is_found_by_its_config_alone(session):
    for name in ("weights", "both", "compiled"):
        assert session[name]["method"] == session[name]["method_unless_named"] == "qoq"


def test_exactly_the_quantized_layers_are_ours_at_every_step(session):
    for name in ("weights", "both"):
        ours = {layer for layer, method in session[name]["layers"].items() if method == "KernelgraftQoQLinearMethod"}
        names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        assert ours == {f"model.layers.{index}.{name}" for index in range(LAYERS) for name in names}
        calls = session[name]["requests"][0]["calls"]
        found = {op: count for op, count in calls.items() if "w4a8" in op}
        assert list(found.values()) == [STEPS * LAYERS] * len(names), found


def test_tokens_and_log_probabilities_are_those_of_transformers(session, models, assert_computes):
    first, long, again = session["weights"]["requests"]
    assert_computes(models["qoq"], PROMPTS, first, TOLERANCE)
    assert_computes(models["qoq"], [LONG_PROMPT], long, TOLERANCE)
    assert again["cached"][0] > len(LONG_PROMPT) // 2
    assert_computes(models["qoq"], [LONG_PROMPT], again, TOLERANCE)


def test_only_who_asks_for_it_gets_the_cache_of_4_bits(session):
    for name, seen in session.items():
        ours = "CPUAttentionBackendImpl" if name == "weights" else "KV4Impl"
        assert set(seen["attention"].values()) == {ours}, name


def test_the_cache_holds_as_many_tokens_as_the_bytes_say(session):
    # float32 keys and values of 32 channels take 256 bytes a token and head; in 4 bits 32, with 8 of scales.
    ratio = session["both"]["cached_tokens"] / session["weights"]["cached_tokens"]
    assert ratio == pytest.approx(256 / 40, rel=1e-3)


@pytest.mark.parametrize(("name", "model"), [("cache", "plain"), ("both", "qoq")])
def test_short_prompts_see_their_own_tokens_as_they_are(session, with_cache, name, model):
    seen = session[name]["requests"][0]
    for prompt, tokens, steps in zip(PROMPTS, seen["tokens"], seen["logprobs"], strict=True):
        total = len(prompt) + len(tokens)
        assert_close_to(with_cache(model)(prompt + tokens, chunks(len(prompt), total)), prompt, tokens, steps, model)


@pytest.mark.parametrize(("name", "model"), [("cache", "plain"), ("both", "qoq")])
def test_a_prompt_in_chunks_reads_the_chunks_before_from_the_cache(session, with_cache, name, model):
    seen = session[name]["requests"][1]
    assert seen["cached"] == [0]
    [tokens], [steps] = seen["tokens"], seen["logprobs"]
    chunk = chunks(len(LONG_PROMPT), len(LONG_PROMPT) + len(tokens))
    assert_close_to(with_cache(model)(LONG_PROMPT + tokens, chunk), LONG_PROMPT, tokens, steps, model)


@pytest.mark.parametrize(("name", "model"), [("cache", "plain"), ("both", "qoq")])
def test_a_prefix_is_read_from_the_cache(session, with_cache, name, model):
    seen = session[name]["requests"][2]
    [hit], [tokens], [steps] = seen["cached"], seen["tokens"], seen["logprobs"]
    assert hit > len(LONG_PROMPT) // 2
    assert hit % BLOCK == 0
    total = len(LONG_PROMPT) + len(tokens)
    before = chunks(len(LONG_PROMPT), total)
    expected = with_cache(model)(LONG_PROMPT + tokens, chunks(len(LONG_PROMPT), total, hit, before=before))
    assert_close_to(expected, LONG_PROMPT, tokens, steps, model)


def test_the_cache_is_not_for_nothing(session, models):
    """The tolerance above tells 4 bits from none."""
    prompt, seen = LONG_PROMPT, session["cache"]["requests"][1]
    [tokens], [steps] = seen["tokens"], seen["logprobs"]
    with torch.no_grad():
        plain = models["plain"](torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
    off = [max(abs(row[int(t)].item() - v) for t, v in found.items()) for row, found in zip(plain, steps, strict=False)]
    assert min(off) > TOLERANCE


def test_a_model_traced_by_the_compiler_computes_the_same(session):
    [compiled], eager = session["compiled"]["requests"], session["both"]["requests"][0]
    assert compiled["tokens"] == eager["tokens"]
    for steps, expected_steps in zip(compiled["logprobs"], eager["logprobs"], strict=True):
        for step, expected in zip(steps, expected_steps, strict=True):
            both = step.keys() & expected.keys()
            assert max(abs(step[token] - expected[token]) for token in both) < TOLERANCE


def test_requests_that_had_to_give_up_their_blocks_are_computed_again(session, with_cache):
    [seen] = session["crowded"]["requests"]
    assert sum(map(len, seen["preempted"])) == 1
    for prompt, tokens, steps, given_up in zip(CROWD, seen["tokens"], seen["logprobs"], seen["preempted"], strict=True):
        total = len(prompt) + CROWD_TOKENS
        assert len(tokens) == CROWD_TOKENS
        expected = with_cache("plain")(prompt + tokens, chunks(len(prompt), total, size=total))
        for again in given_up:  # all that there was until then is one chunk now
            later = with_cache("plain")(prompt + tokens, chunks(again, total, size=total))
            expected = torch.cat([expected[: again - 1], later[again - 1 :]])
        assert_close_to(expected, prompt, tokens, steps, "plain")


def test_models_without_quantized_weights_are_served_with_it_as_well(session):
    assert session["cache"]["method"] is None
