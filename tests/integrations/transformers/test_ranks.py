"""Two processes that calibrate on samples of their own decide as one would that has them all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernelgraft_core.quant.w4a16 import W4A16Weight, dequantize_w4a16

SCRIPT = Path(__file__).with_name("ranked_run.py")
LIMIT = 120  # seconds; ranks that wait for each other forever have failed


def start(float_llama, directory, rank=None, port=None, **settings):
    command = [sys.executable, str(SCRIPT), str(float_llama), str(directory / "out"), str(directory / "result")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if rank is not None:
        environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([*command, json.dumps(settings)], env=environment, stderr=subprocess.PIPE, text=True)


def together(float_llama, directory, **settings):
    """Exit codes of two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(float_llama, directory, rank, port, **settings) for rank in range(2)]
    return finish(ranks)


def finish(processes):
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return codes, errors


def decided(directory, rank=0):
    return json.loads((directory / f"result.{rank}").read_text())


@pytest.fixture(scope="module")
def alone(float_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    codes, errors = finish([start(float_llama, directory)])
    assert codes == [0], errors
    return directory


@pytest.fixture(scope="module")
def both(float_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("both")
    codes, errors = together(float_llama, directory)
    assert codes == [0, 0], errors
    return directory


def test_both_ranks_decide_alike(both):
    assert decided(both, 0) == decided(both, 1)
    assert [block["index"] for block in decided(both)] == [0, 1]


def test_they_see_what_one_process_sees_that_has_all_samples(alone, both):
    for ours, wanted in zip(decided(both), decided(alone), strict=True):
        assert [r["name"] for r in ours["outcome"]] == [r["name"] for r in wanted["outcome"]]
        for report, expected in zip(ours["outcome"], wanted["outcome"], strict=True):
            # All tokens are summed, only in another order. Scales may be others where two were as good, and a weight
            # that is scaled and scaled back may round the other way here and there.
            assert report["error_before"] == pytest.approx(expected["error_before"], rel=1e-2)
            assert report["error_after"] == pytest.approx(expected["error_after"], rel=0.2)


def test_the_checkpoint_is_whole_and_holds_what_was_decided(alone, both, float_tensors):
    files, other = ({p.name for p in (d / "out").iterdir()} for d in (both, alone))
    assert files == other
    assert {p.name for p in both.iterdir()} == {"out", "result.0", "result.1"}
    stored, expected = float_tensors(both / "out"), float_tensors(alone / "out")
    assert {name: t.shape for name, t in stored.items()} == {name: t.shape for name, t in expected.items()}
    for block in decided(both):
        for name, parts in block["weights"].items():
            words, scales, zeros = map(torch.tensor, parts)
            weight = W4A16Weight(words.int(), scales.half(), zeros.byte())
            assert torch.equal(stored[f"{name}.weight"], dequantize_w4a16(*weight.tensors, torch.float32))
    record = json.loads((both / "out" / "kernelgraft.json").read_text())
    assert len(record["layers"]) == 14


@pytest.mark.slow
def test_plain_rounding_over_ranks_gives_the_bytes_of_one_process(float_llama, tmp_path):
    for name in ("alone", "both"):
        (tmp_path / name).mkdir()
    assert finish([start(float_llama, tmp_path / "alone", recipe="rtn")])[0] == [0]
    assert together(float_llama, tmp_path / "both", recipe="rtn")[0] == [0, 0]
    one, other = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("alone", "both"))
    assert one == other


@pytest.mark.slow
def test_the_transforms_of_qoq_are_decided_on_what_all_ranks_see(float_llama, tmp_path):
    for name in ("alone", "both"):
        (tmp_path / name).mkdir()
    assert finish([start(float_llama, tmp_path / "alone", recipe="qoq-chn")])[0] == [0]
    assert together(float_llama, tmp_path / "both", recipe="qoq-chn")[0] == [0, 0]
    assert decided(tmp_path / "both", 0) == decided(tmp_path / "both", 1)
    for ours, wanted in zip(decided(tmp_path / "both"), decided(tmp_path / "alone"), strict=True):
        for report, expected in zip(ours["outcome"], wanted["outcome"], strict=True):
            assert report["name"] == expected["name"]
            assert report["error_before"] == pytest.approx(expected["error_before"], rel=1e-2)
            assert report["error_after"] == pytest.approx(expected["error_after"], rel=0.2)


@pytest.mark.slow
def test_after_one_rank_died_both_go_on_to_the_same_bytes(float_llama, both, tmp_path):
    codes, _ = together(float_llama, tmp_path, die_after=0)
    assert codes[1] == -9
    assert codes[0] != 0
    assert {p.name for p in tmp_path.iterdir()} == {".out.quantizing"}
    codes, errors = together(float_llama, tmp_path)
    assert codes == [0, 0], errors
    for rank in range(2):
        assert [block["index"] for block in decided(tmp_path, rank)] == [1]
    again, never = ((d / "out" / "model.safetensors").read_bytes() for d in (tmp_path, both))
    assert again == never
    assert ".out.quantizing" not in {p.name for p in tmp_path.iterdir()}
