"""quantize, inspect and ppl on the command line: results on stdout, progress on stderr, errors in one sentence."""

import json
import shutil

import pytest
import torch

import kernelgraft
from kernelgraft.cli import builtin_text, main, models

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from kernelgraft_transformers.checkpoint import load_model
from kernelgraft_transformers.texts import encode, perplexity

SMALL = ("--samples", "2", "--seqlen", "16")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, reproducible):
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)
    yield
    for plugin in ("awq", "qoq"):
        kernelgraft.unload_plugin(plugin)


@pytest.fixture
def run(capsys):
    """``run(*arguments)``: the exit code, stdout and stderr of one command."""

    def command(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture(scope="session")
def text(tmp_path_factory, words):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(words)
    return file


@pytest.fixture(scope="session")
def checkpoint(float_llama, text, tmp_path_factory):
    """Made once by the command itself."""
    out = tmp_path_factory.mktemp("cli") / "model"
    with pytest.raises(SystemExit) as caught:
        main(["quantize", str(float_llama), "-o", str(out), "--calib", str(text), "--group-size", "32", *SMALL])
    assert not caught.value.code
    return out


def one_sentence(stderr):
    """The last line of stderr, which is all there is beside progress of the host's own."""
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("kernelgraft: ")
    assert "Traceback" not in stderr
    return line


def test_quantize_writes_a_model_and_says_so(run, float_llama, text, tmp_path):
    out = tmp_path / "model"
    code, stdout, stderr = run("quantize", float_llama, "--out", out, "--calib", text, "--seed", 5, *SMALL)
    assert code == 0
    assert stdout.startswith(f"wrote {out}: awq, 4 bits, group size 64, ")
    assert "model.layers.1.mlp.down_proj output error" in stderr
    assert "output error" not in stdout
    record = json.loads((out / "kernelgraft.json").read_text())
    assert record["calibration"] | {"samples": 2, "length": 16, "seed": 5, "text": str(text)} == record["calibration"]


def test_quantize_takes_settings_of_the_recipe(run, float_llama, text, tmp_path):
    out = tmp_path / "model"
    settings = ("--set", "rotate=false", "--set", "smooth_output=[0.2, 0.8]", "--set", 'zero="pre"')
    code, stdout, _ = run(
        "quantize", float_llama, "-o", out, "--calib", text, "--recipe", "qoq-g64", *settings, *SMALL
    )  # fmt: skip
    assert code == 0
    assert stdout.startswith(f"wrote {out}: qoq-g64, 4 bits, group size 64, ")
    found = json.loads((out / "kernelgraft.json").read_text())["settings"]
    assert (found["rotate"], found["smooth_output"], found["zero"]) == (False, [0.2, 0.8], "pre")
    code, stdout, _ = run("inspect", out)
    assert code == 0
    assert "qoq-g64" in stdout


def test_quantize_has_a_text_of_its_own(run, float_llama, tmp_path):
    out = tmp_path / "model"
    code, stdout, _ = run("quantize", float_llama, "-o", out, "--recipe", "rtn", "--group-size", "-1", *SMALL)
    assert (code, stdout.split(",")[:3]) == (0, [f"wrote {out}: rtn", " 4 bits", " group size -1"])
    record = json.loads((out / "kernelgraft.json").read_text())
    assert record["calibration"]["text"] == f"{models.BUILT_IN_TEXT}, first half"
    assert record["calibration"]["text_tokens"] > 20_000


def test_inspect_shows_what_a_model_holds(run, checkpoint):
    code, stdout, _ = run("inspect", checkpoint)
    assert code == 0
    for shown in ("llama, 2 layers, float16", "KiB", "awq", "4, 32", "14", "recipe awq", "2 x 16 tokens of", "seed 0"):
        assert shown in stdout
    assert "down_proj" not in stdout
    assert "model.layers.1.mlp.down_proj" in run("inspect", checkpoint, "--layers")[1]


def test_inspect_prints_json(run, checkpoint):
    code, stdout, stderr = run("inspect", checkpoint, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    assert (found["quantized_layers"], found["record"]["group_size"]) == (14, 32)


def test_inspect_takes_a_float_model(run, float_llama):
    code, stdout, _ = run("inspect", float_llama, "--layers")
    assert code == 0
    assert "none" in stdout
    assert "no errors are known: there is no record of ours" in stdout


def test_inspect_knows_old_autoawq_checkpoints(run, checkpoint, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(checkpoint, old)
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (old / "quant_config.json").write_text(json.dumps(settings))
    code, stdout, _ = run("inspect", old)
    assert code == 0
    assert [line.split()[1] for line in stdout.splitlines() if line.split()[:1] == ["quantization"]] == ["awq"]


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "awq"])
def test_ppl_prints_one_number(run, float_llama, checkpoint, text, words, quantized):
    directory = checkpoint if quantized else float_llama
    code, stdout, stderr = run("ppl", directory, "--text", text, "--windows", 3, "--seqlen", 32)
    assert code == 0
    model, tokenizer = load_model(str(float_llama), torch.float32), AutoTokenizer.from_pretrained(float_llama)
    plain = perplexity(model, encode(tokenizer, words), window=32, windows=3)
    assert float(stdout) == pytest.approx(plain, rel=0.2 if quantized else 1e-4)
    assert (stdout.strip() == f"{plain:.4f}") != quantized
    assert stdout.strip() not in stderr


def test_ppl_runs_what_it_can_only_load_with_a_plugin(run, float_llama, text, tmp_path):
    command = ("quantize", float_llama, "-o", tmp_path / "qoq", "--calib", text, "--recipe", "qoq-g64", *SMALL)
    assert run(*command)[0] == 0
    results = []
    for directory in (float_llama, tmp_path / "qoq"):
        code, stdout, stderr = run("ppl", directory, "--text", text, "--windows", 3, "--seqlen", 32)
        assert code == 0
        assert "MISSING" not in stderr
        results.append(float(stdout))
    assert results[1] == pytest.approx(results[0], rel=0.2)


def test_ppl_runs_in_other_dtypes_and_has_a_text_of_its_own(run, checkpoint):
    code, stdout, _ = run("ppl", checkpoint, "--dtype", "bfloat16", "--windows", 1, "--seqlen", 32)
    assert code == 0
    assert float(stdout) > 1


USAGE = [
    pytest.param(("quantize", "MODEL"), "--out", id="no-out"),
    pytest.param(
        ("quantize", "MODEL", "-o", "x", "--group-size", "48"), "'48' is not auto, 32, 64, 128 or -1", id="g48"
    ),
    pytest.param(("quantize", "MODEL", "-o", "x", "--samples", "many"), "--samples", id="samples"),
    pytest.param(("quantize", "MODEL", "-o", "x", "--set", "rotate"), "'rotate' is not NAME=VALUE", id="set"),
    pytest.param(("ppl", "MODEL", "--dtype", "int8"), "'int8' is not float32, bfloat16, float16 or auto", id="dtype"),
    pytest.param(("inspect",), "directory", id="no-directory"),
]


@pytest.mark.parametrize(("arguments", "shown"), USAGE)
def test_wrong_usage_exits_with_two(run, arguments, shown):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "")
    assert shown in stderr


def truncate(checkpoint, tmp_path):
    directory = tmp_path / "cut"
    directory.mkdir()
    for file in checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return directory


def test_failures_exit_with_one_and_one_sentence(run, float_llama, checkpoint, text, tmp_path):
    empty, cut = tmp_path / "empty.txt", truncate(checkpoint, tmp_path)
    empty.touch()
    cases = {
        ("quantize", float_llama, "-o", checkpoint): "exists; pass --overwrite to replace it",
        ("quantize", float_llama, "-o", tmp_path / "x", "--calib", empty): "empty.txt is empty",
        ("quantize", float_llama, "-o", tmp_path / "x", "--calib", tmp_path / "none.txt"): "none.txt",
        ("quantize", float_llama, "-o", tmp_path / "x", "--calib", text, "--seqlen", 5000): "has 2000 tokens",
        (
            "quantize",
            float_llama,
            "-o",
            tmp_path / "x",
            "--group-size",
            128,
        ): "q_proj: K = 64 is no multiple of group size 128",
        (
            "quantize",
            float_llama,
            "-o",
            tmp_path / "x",
            "--recipe",
            "magic",
        ): "there are awq, awq+gptq, gptq, qoq-chn",
        ("quantize", checkpoint, "-o", tmp_path / "x"): "is quantized already (awq)",
        ("quantize", tmp_path / "none", "-o", tmp_path / "x"): "none",
        ("inspect", tmp_path / "none"): "none is not a model directory: it has no config.json",
        ("inspect", cut): "holds a file that is not whole: model.safetensors",
        ("ppl", cut, "--text", text): "holds a file that is not whole: model.safetensors",
        ("ppl", float_llama, "--text", text, "--seqlen", 5000): "perplexity needs one window of 5000",
        ("ppl", float_llama, "--text", text, "--windows", 0): "perplexity wants 0 windows",
        ("ppl", float_llama, "--text", empty): "empty.txt is empty",
        ("ppl", tmp_path / "none", "--text", text): f"there is no model directory {tmp_path / 'none'}",
    }
    for arguments, message in cases.items():
        code, stdout, stderr = run(*arguments)
        assert (code, stdout) == (1, ""), arguments
        assert message in one_sentence(stderr), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "empty.txt"]


def test_overwrite_replaces_the_model(run, float_llama, text, tmp_path):
    command = ("quantize", float_llama, "-o", tmp_path / "model", "--calib", text, "--recipe", "rtn", *SMALL)
    assert run(*command)[0] == 0
    (tmp_path / "model" / "stale").touch()
    assert run(*command, "--overwrite")[0] == 0
    assert not (tmp_path / "model" / "stale").exists()


@pytest.mark.parametrize("text", ["48", "", "-2", "64.0", "automatic"])
def test_what_is_no_group_size_is_wrong_usage(text):
    import typer

    with pytest.raises(typer.BadParameter, match="is not auto, 32, 64, 128 or -1"):
        models.parse_group_size(text)


def test_group_sizes_are_parsed():
    assert [models.parse_group_size(t) for t in ("auto", "-1", "32", "64", "128")] == [None, -1, 32, 64, 128]


def test_the_built_in_text_is_long_and_the_same_every_time():
    text = builtin_text.built_in_text()
    assert len(text) > 200_000
    assert text == builtin_text.built_in_text()
