"""The benchmarks themselves: they check before they time, write what they promise, and notice what got slower."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from kernelgraft_core.runtime import timing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmarks():
    """The package at the root of the source tree, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import cases, compare, plot, run

        yield {"cases": cases, "compare": compare, "plot": plot, "run": run}


@pytest.fixture
def tiny(benchmarks, monkeypatch):
    """A case of two variants in a suite's place, fast enough for a test."""
    cases = benchmarks["cases"]

    def prepare(shape):
        x = torch.randn(shape["n"])
        variants = {
            "ours": cases.Variant(lambda: x * 2, 1e-6, "cpu", "float32", weight_bytes=25),
            "theirs": cases.Variant(lambda: x + x, 1e-6, "torch", "float32", weight_bytes=100),
        }
        return cases.Prepared(x.double() * 2, variants)

    case = cases.Case("tiny", "tiny", "cpu", "theirs", ({"n": 8}, {"n": 64}), prepare, lambda s: s["n"])
    monkeypatch.setattr(cases, "CASES", {("cpu", "tiny"): case})
    return case


@pytest.fixture
def results(benchmarks, tiny, tmp_path):
    out = tmp_path / "results.json"
    assert benchmarks["run"].main(["--suite", "cpu", "--threads", "1", "--rounds", "3", "--out", str(out)]) == 0
    return out


def test_results_hold_everything_the_schema_promises(results):
    document = json.loads(results.read_text())
    assert document["schema"] == 1
    assert document["env"]["threads"] == 1
    promised = {
        "kernelgraft",
        "git",
        "dirty",
        "torch",
        "triton",
        "numba",
        "python",
        "cpu",
        "cores",
        "load",
        "gpu",
        "date",
    }
    assert promised <= set(document["env"])
    assert [(r["shape"]["n"], r["variant"]) for r in document["results"]] == [
        (8, "ours"), (8, "theirs"), (64, "ours"), (64, "theirs"),
    ]  # fmt: skip
    for result in document["results"]:
        assert set(result["us"]) == {"p20", "p50", "p80", "min", "n"}
        assert result["us"]["min"] <= result["us"]["p20"] <= result["us"]["p50"] <= result["us"]["p80"]
        assert result["us"]["n"] == 3
        assert result["rel_err_vs_reference"] < 1e-6
        assert result["scratch_bytes"] >= 0
        assert result["gflops"] >= 0
    assert [r["weight_ratio"] for r in document["results"]] == [0.25, 1.0, 0.25, 1.0]
    assert document["results"][1]["speedup"] == 1


def test_a_wrong_result_is_never_timed(benchmarks, tiny, tmp_path, capsys, monkeypatch):
    cases = benchmarks["cases"]
    right = tiny.prepare

    def wrong(shape):
        prepared = right(shape)
        variants = dict(prepared.variants, ours=cases.Variant(lambda: torch.zeros(shape["n"]), 0.1, "cpu", "float32"))
        return cases.Prepared(prepared.reference, variants)

    monkeypatch.setitem(cases.CASES, ("cpu", "tiny"), cases.Case("tiny", "t", "cpu", "theirs", ({"n": 8},), wrong))
    out = tmp_path / "results.json"
    assert benchmarks["run"].main(["--out", str(out)]) == 1
    assert "ours: relative RMS error" in capsys.readouterr().err
    assert not out.exists()


def test_a_backend_that_would_not_run_stops_the_benchmark(benchmarks, monkeypatch):
    cases = benchmarks["cases"]
    with pytest.raises(cases.UnavailableError, match="benchmark_add: backend cpu does not run on cpu"):
        cases.require_backend("benchmark_add", "cpu", "cpu", torch.ones(1), torch.ones(1))


def test_what_a_run_held_beyond_its_result_is_scratch(benchmarks):
    x = torch.ones(1 << 16)
    measure = benchmarks["run"]._scratch_bytes
    # the scalars are tensors of a few bytes to torch
    assert measure(lambda: x * 2, "cpu", x.nbytes) < 64
    assert measure(lambda: (x * 2) + (x * 3), "cpu", x.nbytes) == pytest.approx(2 * x.nbytes, abs=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing"], "suite cpu has no nothing; its cases are tiny"),
        (["--shape", "n"], "shape 'n' is not of the form"),
        (["--shape", "n=7"], "no shape matches"),
        (["--threads", "0"], "threads is 0"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(benchmarks, tiny, arguments, message, capsys):
    assert benchmarks["run"].main(arguments) == 2
    assert message in capsys.readouterr().err


class TestCompare:
    @pytest.fixture
    def pair(self, results, tmp_path):
        document = json.loads(results.read_text())
        other = tmp_path / "new.json"

        def write(change):
            new = copy.deepcopy(document)
            change(new)
            other.write_text(json.dumps(new))
            return [str(results), str(other)]

        return write

    @staticmethod
    def slow_down(factor):
        def change(document):
            document["results"][2]["us"]["p50"] *= factor

        return change

    @pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.05, 0), (1.2, 1), (0.5, 0)])
    def test_only_what_is_slower_than_the_threshold_fails(self, benchmarks, pair, factor, status, capsys):
        assert benchmarks["compare"].main([*pair(self.slow_down(factor)), "--threshold", "1.10"]) == status
        assert ("tiny n=64 ours" in capsys.readouterr().err) == bool(status)

    def test_a_result_that_went_missing_fails(self, benchmarks, pair, capsys):
        assert benchmarks["compare"].main(pair(lambda document: document["results"].pop())) == 1
        assert "tiny n=64 theirs float32: missing" in capsys.readouterr().err

    @pytest.mark.parametrize("key", ["cpu", "threads", "gpu"])
    def test_other_machines_are_refused(self, benchmarks, pair, key, capsys):
        assert benchmarks["compare"].main(pair(lambda document: document["env"].update({key: "other"}))) == 2
        assert f"{key} is" in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 2}'])
    def test_other_files_are_refused(self, benchmarks, results, tmp_path, content, capsys):
        alien = tmp_path / "alien.json"
        alien.write_text(content)
        assert benchmarks["compare"].main([str(results), str(alien)]) == 2
        assert "alien.json" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_plot_comes_from_the_file_alone(benchmarks, results, tmp_path, suffix, begins, capsys):
    out = tmp_path / f"tiny.{suffix}"
    assert benchmarks["plot"].main([str(results), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(begins)
    assert benchmarks["plot"].main([str(results), "--case", "other", "--out", str(out)]) == 2
    assert "no case 'other'; it has tiny" in capsys.readouterr().err


def test_every_registered_case_names_its_peer_and_the_router_is_measured(benchmarks, capsys):
    cases = benchmarks["cases"]
    for (suite, name), case in cases.CASES.items():
        assert (case.suite, case.name) == (suite, name)
        assert case.shapes
    case = cases.CASES["host", "op_overhead"]
    measured = benchmarks["run"].run_case(case, case.shapes[0], rounds=2)
    assert measured[0]["variant"] == case.peer
    assert len(measured) == 7


@pytest.mark.skipif(sys.byteorder != "little", reason="aten's int4 kernel")
@pytest.mark.parametrize("bits", [3, 4])
def test_every_peer_of_a_packed_layer_computes_the_same(benchmarks, monkeypatch, bits):
    cases = benchmarks["cases"]
    monkeypatch.setattr(cases, "require_backend", lambda *_: None)  # whichever backend runs here
    case = cases.CASES["cpu", f"w{bits}a16"]
    monkeypatch.setattr(timing.devices, "cpu_info", lambda: type("Cpu", (), {"last_level_cache": 1 << 16})())
    prepared = case.prepare({"m": 3, "n": 64, "k": 256})
    from kernelgraft_core.runtime.testing import assert_close

    for name, variant in prepared.variants.items():
        if not name.startswith("kernelgraft"):
            assert_close(name, prepared.reference, variant.run(), variant.ratio)
    weights = {name: variant.weight_bytes for name, variant in prepared.variants.items()}
    assert weights["kernelgraft"] / weights["F.linear bf16"] <= bits / 16 + 0.06
