"""kernelgraft convert on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernelgraft.cli import main

pytest.importorskip("transformers")

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.llm_awq import LlmAwq
from kernelgraft_core.quant.formats.qserve import QServe
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.quant.weights import pack_weight


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(capsys):
    """``run(*arguments)``: the exit code, stdout and stderr of ``kernelgraft convert``."""

    def command(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["convert", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture
def weight():
    return pack_weight(
        torch.randint(0, 16, (16, 128)), torch.rand(16, 2).half() + 0.01, torch.randint(0, 16, (16, 2)), 4
    )


@pytest.fixture
def checkpoint(weight, tmp_path):
    """An AutoAWQ checkpoint of one layer."""
    directory, layout = tmp_path / "awq", Gemm(group_size=64)
    directory.mkdir()
    tensors = {f"fc.{part}": tensor for part, tensor in layout.write(weight).items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": layout.config(None)}))
    return directory


LABELS = {
    "awq": "AutoAWQ GEMM",
    "compressed-tensors": "compressed-tensors pack-quantized",
    "kernelgraft": "kernelgraft_awq",
}


@pytest.mark.parametrize("target", LABELS)
def test_it_writes_a_model_and_says_so(run, checkpoint, tmp_path, target):
    code, stdout, _ = run(checkpoint, tmp_path / "out", "--to", target)
    assert code == 0
    assert stdout.startswith(f"wrote {tmp_path / 'out'}: 1 layers from AutoAWQ GEMM to {LABELS[target]}, 1.1 KiB")
    assert run(tmp_path / "out", tmp_path / "back", "--to", "awq")[0] == 0
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_reads_what_llm_awq_writes(run, weight, checkpoint, tmp_path):
    state = {f"fc.{part}": tensor for part, tensor in LlmAwq(group_size=64).write(weight).items()}
    torch.save(state, tmp_path / "w4-g64-v2.pt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    code, stdout, _ = run(
        tmp_path / "w4-g64-v2.pt", tmp_path / "out", "--to", "awq",
        "--from", "llm-awq", "--config", tmp_path / "hf", "--group-size", 64,
    )  # fmt: skip
    assert code == 0
    assert "1 layers from llm-awq to AutoAWQ GEMM" in stdout
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_reads_what_qserve_and_deepcompressor_write(run, tmp_path):
    q, rows = torch.randint(0, 16, (32, 128)), torch.arange(32).unsqueeze(1)
    weight = W4A8Weight.from_integers(q, torch.rand(32), group_scale=1 + rows % 8, group_zero=60 + rows)
    outs = []
    for order, options in (("qserve", ()), ("deepcompressor", ("--from", "qserve", "--s2-order", "deepcompressor"))):
        (tmp_path / order).mkdir()
        state = {f"fc.{part}": tensor for part, tensor in QServe(s2_order=order).write(weight).items()}
        torch.save(state, tmp_path / order / "pytorch_model.bin")
        (tmp_path / order / "config.json").write_text("{}")
        outs.append(tmp_path / f"from-{order}")
        code, stdout, _ = run(tmp_path / order, outs[-1], "--to", "qoq", *options)
        assert code == 0
        assert "1 layers from QServe to qoq" in stdout
    first, second = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_says_when_scales_lose_bits(run, checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["fc.scales"] = tensors["fc.scales"].float() * 1.0001
    save_file(tensors, checkpoint / "model.safetensors")
    code, stdout, stderr = run(checkpoint, tmp_path / "out", "--to", "kernelgraft")
    assert (code, stdout.count("\n")) == (0, 1)
    assert "scales of 1 layers were not float16 and lost bits, fc the first" in stderr


def test_wrong_usage_exits_with_two(run, checkpoint, tmp_path):
    for arguments, shown in (
        ((checkpoint, tmp_path / "out"), "--to"),
        ((checkpoint, "--to", "awq"), "OUT"),
        ((checkpoint, tmp_path / "out", "--to", "awq", "--group-size", "many"), "--group-size"),
    ):
        code, stdout, stderr = run(*arguments)
        assert (code, stdout) == (2, ""), arguments
        assert shown in stderr


def test_failures_exit_with_one_and_one_sentence(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    cases = {
        (checkpoint, out, "--to", "gguf"): "no target format 'gguf'; there are awq, compressed-tensors, kernelgraft",
        (checkpoint, out, "--to", "awq", "--from", "llm-awq"): "are given together or not at all",
        (tmp_path / "none", out, "--to", "awq"): "none is neither a model directory nor a file",
        (checkpoint, checkpoint, "--to", "awq", "--overwrite"): "awq holds what is to be converted",
        (checkpoint, tmp_path / "full", "--to", "awq"): "full exists; pass --overwrite to replace it",
    }
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    for arguments, message in cases.items():
        code, stdout, stderr = run(*arguments)
        assert (code, stdout) == (1, ""), arguments
        assert message in stderr.strip().splitlines()[-1], arguments
        assert "Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["awq", "full"]


def test_help_shows_how(run):
    code, stdout, _ = run("--help")
    assert code == 0
    assert "kernelgraft convert ./llama-awq ./llama-ct --to compressed-tensors" in stdout
