"""Block-wise calibration: what blocks are called with, and statistics that equal those of all tokens at once."""

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.sequential import BlockInputs, InputStatistics, capture_block_inputs, watch_inputs
from kernelgraft_core.runtime.errors import NonFiniteError


class Block(nn.Module):
    """Adds its shift; returns a tuple, as blocks of older models do, when told so."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls, self.as_tuple = 0, as_tuple

    def forward(self, hidden_states, shift):
        self.calls += 1
        out = self.linear(hidden_states) + shift
        return (out, None) if self.as_tuple else out


class Decoder(nn.Module):
    def __init__(self, by_keyword=False):
        super().__init__()
        self.embed, self.by_keyword = nn.Embedding(10, 4), by_keyword
        self.blocks = nn.ModuleList([Block(as_tuple=True), Block()])

    def forward(self, input_ids, use_cache):
        assert not use_cache
        hidden = self.embed(input_ids)
        for block in self.blocks:
            out = block(hidden_states=hidden, shift=2.0) if self.by_keyword else block(hidden, shift=2.0)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


@pytest.fixture(params=[False, True], ids=["positional", "keyword"])
def decoder(request):
    return Decoder(by_keyword=request.param)


@torch.no_grad()
def test_the_inputs_of_the_first_block_are_captured_without_running_it(decoder):
    batches = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])]
    inputs = capture_block_inputs(decoder, decoder.blocks[0], batches)
    assert [block.calls for block in decoder.blocks] == [0, 0]
    assert all(torch.equal(h, decoder.embed(b)) for h, b in zip(inputs.hidden, batches, strict=True))
    assert inputs.kwargs == [{"shift": 2.0}] * 2

    through = inputs.through(decoder.blocks[0]).through(decoder.blocks[1])  # nothing is left behind to stop it
    assert all(torch.equal(h, decoder(b, use_cache=False)) for h, b in zip(through.hidden, batches, strict=True))


def test_a_model_that_fails_leaves_no_hook_behind(decoder):
    with pytest.raises(IndexError):
        capture_block_inputs(decoder, decoder.blocks[0], [torch.tensor([[99]])])
    decoder(torch.tensor([[1]]), use_cache=False)
    assert decoder.blocks[1].calls == 1


def test_no_batches_give_no_inputs(decoder):
    inputs = capture_block_inputs(decoder, decoder.blocks[0], [])
    assert (inputs.hidden, inputs.tokens) == ([], 0)


def lengths(inputs):
    return [h.shape[1] for h in inputs.hidden]


def test_enough_batches_are_taken_from_the_front_or_spread_over_all():
    inputs = BlockInputs([torch.zeros(1, 10 + i, 4) for i in range(8)], [{"i": i} for i in range(8)])
    assert inputs.tokens == sum(range(10, 18))
    assert lengths(inputs.take(11)) == [10, 11]
    assert lengths(inputs.take(1000)) == lengths(inputs)
    spread = inputs.spread(10)  # about 4 * 10 of 108 tokens
    assert lengths(spread) == [10, 12, 14, 16]
    assert [kw["i"] for kw in spread.kwargs] == [0, 2, 4, 6]
    assert lengths(inputs.spread(1000)) == lengths(inputs)


def test_watching_sees_every_call_until_it_ends():
    block, seen = Block(), []
    x = torch.randn(2, 3, 4)
    with watch_inputs({"linear": block.linear}, lambda name, value: seen.append((name, value))):
        block(x, 0.0)
        block(x + 1, 0.0)
    block(x, 0.0)
    assert [name for name, _ in seen] == ["linear", "linear"]
    assert torch.equal(seen[1][1], x + 1)


def statistics_of(batches, group_size):
    statistics = InputStatistics(batches[0].shape[-1], group_size, torch.device("cpu"))
    for batch in batches:
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("group_size", [4, 12])
def test_statistics_of_batches_equal_those_of_all_tokens(group_size):
    batches = [torch.randn(2, 5, 12), torch.randn(1, 3, 12).bfloat16(), torch.randn(7, 12)]
    tokens = torch.cat([batch.reshape(-1, 12).double() for batch in batches])
    statistics = statistics_of(batches, group_size)

    assert statistics.tokens == 20
    torch.testing.assert_close(statistics.mean_abs.double(), tokens.abs().mean(0), rtol=1e-6, atol=1e-7)
    by_group = tokens.view(20, -1, group_size)
    moments = torch.einsum("tgi,tgj->gij", by_group, by_group) / 20
    torch.testing.assert_close(statistics.moments.double(), moments, rtol=1e-5, atol=1e-6)


def test_moments_of_scaled_inputs_need_no_second_look_at_the_tokens():
    batches, scales = [torch.randn(6, 12), torch.randn(9, 12)], torch.rand(12) + 0.5
    scaled = statistics_of([batch / scales for batch in batches], 4)
    torch.testing.assert_close(statistics_of(batches, 4).moments_of_scaled(scales), scaled.moments)


def test_statistics_of_nothing_are_zero():
    statistics = InputStatistics(8, 4, torch.device("cpu"))
    statistics.add(torch.empty(0, 8))
    assert not statistics.mean_abs.any()
    assert not statistics.moments.any()
    statistics.check("a layer")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_name_the_layer(value):
    x = torch.randn(3, 8)
    x[1, 2] = x[2, 5] = value
    with pytest.raises(NonFiniteError, match=r"activations of layers\.3\.up_proj are not finite in 2 of 8 channels"):
        statistics_of([x], 4).check("layers.3.up_proj")
