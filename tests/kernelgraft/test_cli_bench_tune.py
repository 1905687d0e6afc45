"""``kernelgraft bench`` and ``kernelgraft tune``, and the plan that steers W4A16 on CPU."""

import json
import os

import pytest
import torch

from kernelgraft.cli import main
from kernelgraft_core.quant.packed import cpu
from kernelgraft_core.quant.w4a16 import W4A16Weight, reference
from kernelgraft_core.quant.w4a16.examples import example_args
from kernelgraft_core.runtime import plans
from kernelgraft_core.runtime.op import Implementation, registered_ops
from kernelgraft_core.runtime.testing import assert_close

SMALL = ("--shape", "64x256", "--group-size", "64")


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code or 0


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty plan store in the place of the process's own."""
    made = plans.PlanStore(tmp_path / "plans")
    monkeypatch.setattr(plans, "PLANS", made)
    monkeypatch.setattr(cpu, "PLANS", made)
    return made


@pytest.fixture
def weight():
    _, qweight, scales, zeros, _ = example_args("cpu", n=64, k=256)["w4a16_linear"]
    return W4A16Weight(qweight, scales, zeros)


def remember(store, path, *, tokens=16, n=64):
    """A plan as ``kernelgraft tune`` leaves it."""
    shape = cpu.plan_shape(tokens, n, 256, 64, torch.bfloat16)
    with store.tuning():
        store.tune(*cpu.plan_op(4), cpu._arch(), shape, {path: ({"path": path}, lambda: None)}, lambda run: 1.0)


def test_bench_times_every_backend_beside_the_peer(capsys):
    assert run("bench", *SMALL, "--tokens", "2", "--rounds", "2", "--threads", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["environment"]["threads"] == 1
    results = {(r["op"], r["variant"]): r for r in document["results"]}
    device = document["results"][0]["device"]
    ours = {"cpu", "reference"} if device == "cpu" else {"triton", "reference"}
    for op, peer in (("w4a16_linear", "F.linear bfloat16"), ("w4a16_linear_dgrad", "torch.matmul bfloat16")):
        assert {variant for of, variant in results if of == op} == ours | {peer}
        for variant in (*ours, peer):
            result = results[op, variant]
            assert (result["peer"], result["shape"]) == (peer, {"m": 2, "n": 64, "k": 256, "group": 64})
            ratio = results[op, peer]["us"]["p50"] / result["us"]["p50"]
            assert result["speedup"] == pytest.approx(ratio, abs=2e-3)
    assert "KERNELGRAFT_BACKEND" not in os.environ


def test_bench_times_nothing_that_computes_something_else(capsys):
    op = registered_ops()["w4a16_linear"]
    undo = op.register(
        Implementation("wrong", lambda x, *rest: 2 * reference.w4a16_linear(x, *rest), ("cpu", "cuda"), 99)
    )
    try:
        assert run("bench", *SMALL, "--op", "w4a16_linear", "--tokens", "1", "--rounds", "1") == 1
    finally:
        undo()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kernelgraft: w4a16_linear on backend wrong differs from F.linear bfloat16 by 1.0e+00")


def test_a_width_that_cannot_hold_the_weight_is_left_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run("bench", "--shape", "64x240", "--group-size", "16", "--tokens", "1", "--rounds", "1") == 0
    printed = capsys.readouterr()
    assert "w4a16_linear" in printed.out
    assert "w3a16" not in printed.out
    assert "w3a16 left out: group size 16 is not a multiple of 32" in printed.err


def test_tuning_leaves_out_a_width_that_cannot_hold_the_weight(store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run("tune", "--shape", "64x240", "--group-size", "16", "--tokens", "1") == 0
    assert "w3a16_linear left out: group size 16 is not a multiple of 32" in capsys.readouterr().err


def test_the_table_names_ops_and_shapes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run("bench", *SMALL, "--op", "w4a16_linear", "--tokens", "1", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert "64x256" in out
    assert "F.linear bfloat16" in out
    assert "dgrad" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bench", "--op", "w5a16"], 1, "there is no op w5a16 to measure"),
        (["bench", "--shape", "4096"], 2, "'4096' is not output x input features"),
        (["bench", "--tokens", "0"], 2, "0 is not 1 or more"),
        (["bench", "--group-size", "96", "--shape", "64x256"], 1, "group size 96 does not divide K = 256"),
        (
            ["bench", "--op", "w3a16_linear", "--group-size", "16", "--shape", "64x256"],
            1,
            "group size 16 is not a multiple of 32, as weights of 3 bits need",
        ),
        (["tune", "w3a16_linear", "--group-size", "8"], 1, "group size 8 is not a multiple of 32"),
        (["tune", "w5a16"], 1, "'w5a16' cannot be tuned; there are w3a16_linear, w4a16_linear"),
        (["tune", "--dtype", "int8"], 2, "'int8' is not bfloat16, float16 or float32"),
    ],
)
def test_wrong_arguments_are_refused(arguments, code, message, store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(*arguments) == code
    assert message in capsys.readouterr().err


def test_tune_saves_the_fastest_path_and_the_op_takes_it(store, weight, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    microseconds = iter([9.0, 5.0, 5.0, 9.0])  # of the rule's choice and of the other path, at 1 and at 16 tokens
    monkeypatch.setattr(cpu, "measure_us", lambda run: (run(), next(microseconds))[1])
    usual = [cpu.choose_path(m, weight, torch.bfloat16) for m in (1, 16)]

    assert run("tune", "w4a16_linear", *SMALL, "--tokens", "1", "--tokens", "16") == 0

    out = capsys.readouterr().out
    assert "64x256" in out
    assert str(store.path(cpu._arch())) in out
    saved = json.loads(store.path(cpu._arch()).read_text())["plans"]
    assert sorted(key.partition("|")[2] for key in saved) == [
        "dtype=bfloat16,group=64,k=256,m=1,n=64",
        "dtype=bfloat16,group=64,k=256,m=16,n=64",
    ]
    chosen = [cpu.choose_path(m, weight, torch.bfloat16) for m in (1, 2, 9, 16)]
    assert chosen[0] != usual[0]
    assert chosen[1:] == [usual[0], usual[1], usual[1]]
    # Another process finds the file.
    monkeypatch.setattr(cpu, "PLANS", plans.PlanStore(store.directory))
    assert cpu.choose_path(1, weight, torch.bfloat16) == chosen[0]


@pytest.mark.parametrize("path", ["integer", "dequantize"])
def test_a_plan_changes_the_way_and_not_the_result(store, path):
    args = example_args("cpu", m=16, n=64, k=256)["w4a16_linear"]
    truth = reference.w4a16_linear(args[0].double(), *args[1:4], args[4].double())
    remember(store, path)
    assert_close(path, truth, registered_ops()["w4a16_linear"](*args), 5e-3)


def test_plans_hold_up_to_the_next_power_of_two_and_for_one_shape(store, weight):
    usual = cpu.choose_path(16, weight, torch.bfloat16)
    other = {"integer": "dequantize", "dequantize": "integer"}.get(usual, "dequantize")
    remember(store, other)
    assert [cpu.choose_path(m, weight, torch.bfloat16) for m in (8, 9, 16, 17)] == [usual, other, other, usual]
    assert cpu.choose_path(16, weight, torch.float32) == usual
    assert cpu.plan_shape(5000, 64, 256, 64, torch.bfloat16)["m"] == cpu.LARGEST_BUCKET


def test_a_plan_that_cannot_run_here_is_ignored(store):
    _, qweight, scales, zeros, _ = example_args("cpu", n=3, k=256)["w4a16_linear"]
    remember(store, "integer", n=3)
    assert cpu.choose_path(16, W4A16Weight(qweight, scales, zeros), torch.bfloat16) == "dequantize"


def test_a_plan_of_nonsense_is_ignored(store, weight):
    usual = cpu.choose_path(16, weight, torch.bfloat16)
    remember(store, "sideways")
    assert cpu.choose_path(16, weight, torch.bfloat16) == usual


def test_nothing_is_tuned_where_plans_are_off(store, monkeypatch, capsys):
    monkeypatch.setenv("KERNELGRAFT_PLANS", "off")
    assert run("tune", *SMALL) == 1
    assert capsys.readouterr().err.endswith("kernelgraft: KERNELGRAFT_PLANS is off: nothing measured would be used\n")
    assert not store.directory.exists()


def test_outside_of_tune_nothing_is_measured(store, monkeypatch):
    def measure(run):
        raise AssertionError("measured")

    monkeypatch.setattr(cpu, "measure_us", measure)
    registered_ops()["w4a16_linear"](*example_args("cpu")["w4a16_linear"])
