"""Which tile a GPU takes for W4A8: decided here without one."""

from dataclasses import replace

import pytest

from kernelgraft_core.quant.w4a8 import triton_tiles
from kernelgraft_core.quant.w4a8.triton_tiles import VERSION, Product, candidates, choose, parameters
from kernelgraft_core.runtime.plans import PLANS

H100 = Product("w4a8_linear", 1, 4096, 4096, 128, 90, "sm_90-test", 132)


def test_splits_fill_a_gpu_and_no_more():
    assert triton_tiles.choose_splits(64, 32, 132) == 4
    assert triton_tiles.choose_splits(512, 32, 132) == 1
    assert triton_tiles.choose_splits(4, 112, 132) == 16
    assert triton_tiles.choose_splits(4, 3, 132) == 1


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 100, 4096])
@pytest.mark.parametrize("k", [64, 192, 4096, 14336])
def test_candidates_take_whole_steps_and_no_part_is_empty(tokens, k):
    found = candidates(replace(H100, tokens=tokens, k=k)).values()
    assert found
    for tile, splits in found:
        steps = k // tile.columns
        assert k % tile.columns == 0
        assert splits == 1 or steps // splits >= 2


def test_tiles_of_candidates_are_filled_by_half_at_least_if_there_are_smaller_ones():
    assert {tile.tokens for tile, _ in candidates(replace(H100, tokens=1)).values()} == {16}
    assert {tile.tokens for tile, _ in candidates(replace(H100, tokens=40)).values()} == {16, 32, 64}
    assert {tile.tokens for tile, _ in candidates(replace(H100, tokens=4096)).values()} == {16, 32, 64, 128}


@pytest.fixture
def stored(monkeypatch):
    """``stored(plan)``: what the plan store answers."""

    def store(plan):
        asked = []
        monkeypatch.setattr(PLANS, "lookup", lambda *args: asked.append(args) or plan)
        return asked

    return store


def test_a_plan_is_taken(stored):
    for planned in candidates(H100).values():
        asked = stored(parameters(*planned))
        assert choose(H100) == planned
        assert asked == [("w4a8_linear", VERSION, "sm_90-test", {"m": 1, "n": 4096, "k": 4096, "group": 128})]


@pytest.mark.parametrize("change", [{"rows": 48}, {"splits": 3}, {"splits": None}, {"more": 1}])
def test_a_plan_that_is_no_candidate_is_not(stored, change):
    stored(None)
    by_rule = choose(H100)
    stored(parameters(*next(iter(candidates(H100).values()))) | change)
    assert choose(H100) == by_rule
