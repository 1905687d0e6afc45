"""Block-wise calibration: what blocks are called with, and statistics that equal those of all tokens at once."""

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.sequential import (
    BlockCalls,
    BlockInputs,
    capture_block_calls,
    watch_inputs,
)


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
    """Calls each block in its own way, and adds to the hidden states in front of the second."""

    def __init__(self, by_keyword=False):
        super().__init__()
        self.embed, self.by_keyword = nn.Embedding(10, 4), by_keyword
        self.blocks = nn.ModuleList([Block(as_tuple=True), Block(), Block()])

    def forward(self, input_ids, use_cache, image=None):
        assert not use_cache
        hidden = self.embed(input_ids)
        for index, block in enumerate(self.blocks):
            if index == 1 and image is not None:
                hidden = hidden + image
            shift = 2.0 + index
            out = block(hidden_states=hidden, shift=shift) if self.by_keyword else block(hidden, shift=shift)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


@pytest.fixture(params=[False, True], ids=["positional", "keyword"])
def decoder(request):
    return Decoder(by_keyword=request.param)


BATCHES = [
    {"input_ids": torch.tensor([[1, 2, 3]]), "image": torch.linspace(-1, 1, 12).view(1, 3, 4)},
    {"input_ids": torch.tensor([[4, 5]])},
]


@torch.no_grad()
def test_calls_are_captured_without_running_a_block(decoder):
    decoder.blocks.to("meta")
    calls = capture_block_calls(decoder, decoder.blocks, BATCHES)
    assert [block.calls for block in decoder.blocks] == [0, 0, 0]
    assert all(torch.equal(h, decoder.embed(b["input_ids"])) for h, b in zip(calls.first, BATCHES, strict=True))
    assert calls.kwargs == [[{"shift": 2.0 + index}] * 2 for index in range(3)]
    assert torch.equal(calls.between[1][0], BATCHES[0]["image"])
    assert [extra is None for row in calls.between for extra in row] == [True, True, False, True, True, True]


@torch.no_grad()
def test_block_after_block_is_the_whole_model(decoder):
    calls = capture_block_calls(decoder, decoder.blocks, BATCHES)
    hidden = calls.first
    for index, block in enumerate(decoder.blocks):
        outputs = list(calls.inputs(index, hidden).outputs(block))
        hidden = list(calls.entering(index + 1, outputs)) if index < 2 else outputs
    wanted = [decoder(**batch, use_cache=False) for batch in BATCHES]  # nothing is left behind to stop it
    assert all(map(torch.equal, hidden, wanted))


def test_a_forward_of_the_blocks_own_comes_back(decoder):
    """Accelerate puts one there, to move weights."""
    block = decoder.blocks[0]
    block.forward = own = lambda *args, **kwargs: None
    capture_block_calls(decoder, decoder.blocks, BATCHES)
    assert block.forward is own
    assert all("forward" not in other.__dict__ for other in decoder.blocks[1:])


def test_a_model_that_fails_is_left_as_it_was(decoder):
    with pytest.raises(IndexError):
        capture_block_calls(decoder, decoder.blocks, [{"input_ids": torch.tensor([[99]])}])
    decoder(torch.tensor([[1]]), use_cache=False)
    assert decoder.blocks[2].calls == 1


def test_no_batches_give_no_calls(decoder):
    calls = capture_block_calls(decoder, decoder.blocks, [])
    assert (calls.first, calls.kwargs, calls.between) == ([], [[], [], []], [[], [], []])
    assert calls.inputs(0, []).tokens == 0


def test_arguments_move_to_the_device_of_the_block_however_deep_they_lie():
    nested = {"rope": (torch.ones(2), torch.zeros(2)), "cache": {"mask": torch.ones(3)}, "flag": None, "n": 3}
    (moved,) = BlockCalls([], [[nested]], [[None]]).inputs(0, [torch.zeros(1, 2, 4)], torch.device("meta")).kwargs
    assert [t.device.type for t in (*moved["rope"], moved["cache"]["mask"])] == ["meta"] * 3
    assert (moved["flag"], moved["n"], type(moved["rope"])) == (None, 3, tuple)


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
