"""The QoQ ladder: every row adds its step and nothing else, and the gap is counted from RTN to float32."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from kernelgraft_core.quant.qoq import QoqConfig, as_served, qoq_config
from kernelgraft_core.quant.rounding import Scheme

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def ladder():
    """The module of the package at the root of the source tree, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])
        from benchmarks import qoq_ladder

        yield qoq_ladder


def settings(row):
    return asdict(replace(qoq_config(Scheme(4, 64)), **row.settings))


def test_every_row_adds_its_step_and_the_last_is_the_recipe(ladder):
    rows = {name: row for name, row in ladder.ladder().items() if row.recipe == "qoq-g64" and row.served}
    assert list(rows) == ["no step", *(f"+ {name}" for name in list(ladder.STEPS)[:-1]), "+ reordering: qoq-g64"]
    own = asdict(qoq_config(Scheme(4, 64)))
    before = settings(rows.pop("no step"))
    assert all(before[name] != own[name] for changed in ladder.STEPS.values() for name in changed)
    for row, step in zip(rows.values(), ladder.STEPS, strict=True):
        after = settings(row)
        assert {name for name in own if after[name] != before[name]} == set(ladder.STEPS[step])
        before = after
    assert before == own
    assert row.seeds


def test_per_channel_rows_know_the_settings(ladder):
    rows = [row for row in ladder.ladder().values() if row.recipe == "qoq-chn"]
    for row in rows:
        assert isinstance(replace(qoq_config(Scheme(4, -1)), **row.settings), QoqConfig)
    assert [row.bar for row in rows] == [None, -0.25]


def test_the_share_is_of_the_gap_from_rtn_to_float32(ladder):
    names = list(ladder.ladder())
    recipe = "+ reordering: qoq-g64"
    found = [(names[0], 0, 30.0), (names[1], 0, 40.0), (recipe, 0, 37.0), (recipe, 1, 38.0), ("qoq-chn", 0, 43.0)]
    rows = [{"row": name, "seed": seed, "perplexity": perplexity} for name, seed, perplexity in found]
    summary = {line["row"]: line for line in ladder.summarize(rows)}
    assert summary[recipe] == {
        "row": recipe, "seeds": 2, "perplexity": 37.5, "below_rtn": 0.25, "below_rtn_by_seed": [0.3, 0.2],
        "bar": 0.25, "met": True,
    }  # fmt: skip
    assert summary["qoq-chn"]["below_rtn"] == pytest.approx(-0.3)
    assert not summary["qoq-chn"]["met"]
    table = ladder.table(list(summary.values()))
    assert f"| {recipe} | 37.50 | 25.0 % | 25 %: met |" in table
    assert "| qoq-chn | 43.00 | -30.0 % | -25 %: not met |" in table


@torch.no_grad()
def test_decoding_sees_what_all_tokens_at_once_see(ladder):
    from kernelgraft_core.quant.architectures import find_architecture

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    tokens = torch.randint(0, 50, (24,))
    with as_served(find_architecture(model), model.model.layers):
        assert ladder.decoding_difference(model, tokens) < 1e-12
    # Rounded when all tokens come at once and not one by one: it would show.
    served = as_served(find_architecture(model), model.model.layers)
    forward = model.forward

    def only_at_once(*args, **arguments):
        if arguments.get("past_key_values") is None:
            with served:
                return forward(*args, **arguments)
        return forward(*args, **arguments)

    model.forward = only_at_once
    assert ladder.decoding_difference(model, tokens) > 1e-3
