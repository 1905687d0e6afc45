"""Block by block, whatever the method: order, resuming, and what is refused before anything changes."""

import copy
from contextlib import contextmanager

import pytest
import torch

from kernelgraft_core.quant.architectures import find_architecture
from kernelgraft_core.quant.awq import AwqMethod, rtn_config
from kernelgraft_core.quant.outcome import BlockOutcome, Method
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.runner import InMemory, ModelBlocks, quantize_blocks, quantize_model
from kernelgraft_core.quant.sequential import capture_block_calls
from kernelgraft_core.runtime.errors import NonFiniteError, UnsupportedModelError

transformers = pytest.importorskip("transformers")

BLOCKS, HIDDEN, INNER, GROUP = 3, 64, 128, 32


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.125, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def unchanged(model):
    """Afterwards the model has to be as it was."""
    before = copy.deepcopy(model.state_dict())
    yield
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def batches(count=3, length=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 100, (1, length), generator=generator) for _ in range(count)]


class Halving(Method):
    """A method that halves what a block adds by its MLP, and remembers what it was given."""

    def __init__(self):
        self.seen = []

    def quantize_block(self, architecture, block, path, inputs):
        self.seen.append((path, [hidden.clone() for hidden in inputs.hidden]))
        block.mlp.down_proj.weight.data.mul_(0.5)
        return BlockOutcome({}, ())


def run(model, method=None, given=None, group_size=GROUP):
    given = batches() if given is None else given
    return list(quantize_model(model, given, method or Halving(), scheme_group_size=group_size))


def entering(model, index):
    """What really enters a block, from a hook in a forward pass of the whole model."""
    seen = []
    hook = model.model.layers[index].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch, use_cache=False)
    hook.remove()
    return seen


def test_each_block_is_quantized_on_what_the_quantized_ones_before_produce(model):
    method = Halving()
    results = run(model, method)
    assert [(r.index, r.count) for r in results] == [(index, BLOCKS) for index in range(BLOCKS)]
    assert [path for path, _ in method.seen] == [f"model.layers.{index}" for index in range(BLOCKS)]
    for index, (_, hidden) in enumerate(method.seen):
        assert all(map(torch.equal, hidden, entering(model, index)))


def test_batches_may_be_arguments_of_the_model(model):
    by_tensor, by_name = Halving(), Halving()
    run(copy.deepcopy(model), by_tensor)
    run(model, by_name, [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches()])
    for (_, one), (_, other) in zip(by_tensor.seen, by_name.seen, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_of_padding_reaches_every_block(model):
    """Left-padded tokens change nothing behind them."""
    plain, padded = Halving(), Halving()
    (ids,) = batches(count=1)
    mask, positions = torch.ones(1, 20, dtype=torch.int64), torch.arange(-4, 16).clamp(min=0).unsqueeze(0)
    mask[:, :4] = 0
    run(copy.deepcopy(model), plain, [ids])
    arguments = {"input_ids": torch.cat([ids[:, :4], ids], 1), "attention_mask": mask, "position_ids": positions}
    run(model, padded, [arguments])
    for (_, (one,)), (_, (other,)) in zip(plain.seen, padded.seen, strict=True):
        torch.testing.assert_close(other[:, 4:], one)


def test_blocks_come_one_at_a_time(model):
    original = copy.deepcopy(model)
    next(iter(quantize_model(model, batches(), Halving(), scheme_group_size=GROUP)))
    weights, before = ([layer.mlp.down_proj.weight for layer in m.model.layers] for m in (model, original))
    assert [torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == [False, True, True]


def in_parts(model, start, hidden, finished=None, activations=None):
    architecture = find_architecture(model)
    blocks, method = ModelBlocks(architecture, model), Halving()
    calls = capture_block_calls(model, list(model.model.layers), [{"input_ids": batch} for batch in batches()])
    with torch.no_grad():
        results = list(
            quantize_blocks(
                architecture, blocks, calls, method, activations or InMemory(), start=start, hidden=hidden,
                finished=finished,
            )
        )  # fmt: skip
    return results, method.seen


@torch.no_grad()
def test_going_on_in_the_middle_is_the_same_as_never_having_stopped(model):
    _, whole = in_parts(copy.deepcopy(model), 0, None)
    results, rest = in_parts(model, 1, whole[1][1])
    assert [r.index for r in results] == [1, 2]
    for (path, hidden), (again, found) in zip(whole[1:], rest, strict=True):
        assert path == again
        assert all(map(torch.equal, hidden, found))


def test_the_next_block_sees_what_this_one_gives_when_it_is_served(model):
    original = copy.deepcopy(model)

    class Served(Halving):
        """While a block is served as it will be, its MLP gives nothing."""

        @contextmanager
        def as_served(self, architecture, block):
            with block.mlp.down_proj.register_forward_hook(lambda module, args, out: out * 0):
                yield

    method = Served()
    run(model, method)
    for layer in original.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    for index, (_, hidden) in enumerate(method.seen):
        assert all(map(torch.equal, hidden, entering(original, index)))
    assert all(layer.mlp.down_proj.weight.any() for layer in model.model.layers)


class Around(Halving):
    """A method that doubles the embeddings and puts ones into the head."""

    def around(self, architecture, model):
        return {"model.embed_tokens.weight": lambda w: 2 * w, "lm_head.weight": torch.ones_like}


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_around_the_blocks_are_changed_before_the_first_is_calibrated(model, tied):
    original = copy.deepcopy(model)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    method = Around()
    run(model, method)
    original.model.embed_tokens.weight.data *= 2
    assert all(map(torch.equal, method.seen[0][1], entering(original, 0)))
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert (model.lm_head.weight == 1).all()
    assert not model.config.tie_word_embeddings


def test_a_finished_block_is_handed_over_before_the_inputs_of_the_next_are_kept(model):
    events = []

    class Recording(InMemory):
        def keep(self, index, hidden):
            events.append(("keep", index))
            return super().keep(index, hidden)

    def finished(index, block, outcome):
        assert block is model.model.layers[index]
        events.append(("finished", index))

    in_parts(model, 0, None, finished, Recording())
    assert events == [("keep", 0), ("finished", 0), ("keep", 1), ("finished", 1), ("keep", 2), ("finished", 2)]


def test_what_finished_changes_in_a_block_is_what_the_next_one_sees(model):
    """Checkpoints store 16 bits; the next block is calibrated on the rounded norms too."""

    def finished(index, block, outcome):
        block.input_layernorm.weight.data.mul_(1.5)

    _, seen = in_parts(model, 0, None, finished)
    assert all(map(torch.equal, seen[2][1], entering(model, 2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_name_the_layer_before_anything_changes(request, model, value):
    model.model.layers[1].mlp.up_proj.weight.data[2, 3:5] = value
    request.getfixturevalue("unchanged")
    message = rf"weights of model\.layers\.1\.mlp\.up_proj are not finite in 2 of {HIDDEN * INNER} places"
    with pytest.raises(NonFiniteError, match=message):
        run(model)


@pytest.mark.parametrize("group_size", [48, 128])
def test_a_group_size_that_does_not_divide_is_refused_before_anything_changes(model, unchanged, group_size):
    message = rf"model\.layers\.0\.self_attn\.q_proj: group size {group_size} does not divide K = 64"
    with pytest.raises(ValueError, match=message):
        run(model, AwqMethod(rtn_config(Scheme(4, group_size))), group_size=group_size)


def test_a_group_size_that_only_a_later_layer_refuses_is_refused_as_early(request, model):
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(100, HIDDEN)
    request.getfixturevalue("unchanged")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: group size 32 does not divide K = 100"):
        run(model)


def test_a_model_of_another_family_is_refused_with_the_known_ones():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=10, n_positions=8)
    )
    with pytest.raises(UnsupportedModelError, match=r"model type 'gpt2'; known: .*llama, .*mistral"):
        run(model)


def test_a_model_that_is_quantized_already_is_refused(model):
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj of LlamaDecoderLayer is Identity, expected Linear"):
        run(model)


def test_no_batches_are_refused(model, unchanged):
    with pytest.raises(ValueError, match="no calibration batches were given"):
        run(model, given=[])
