"""A quantization that is killed, wherever, goes on and gives the bytes of one that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).with_name("killed_runs.py")
BLOCKS = 3
QUICK = {"settings": {"scale_points": 3, "clip_steps": 2}}
# Rotation makes embeddings, norms and an output head that the source's files do not hold.
QOQ = {"recipe": "qoq-chn", "settings": {"clip_steps": 2}}


@pytest.fixture(scope="module")
def model(float_llama, tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("three-blocks")
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=2,
        initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(directory)
    AutoTokenizer.from_pretrained(float_llama).save_pretrained(directory)
    return directory


def killed(model, directory, first, stride, **settings):
    """See the script."""
    command = [sys.executable, str(SCRIPT), str(model), str(directory), str(first), str(stride), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found, *, old=False):
    """Every run went on, from no earlier than the one that was killed sooner, to the same bytes."""
    start = 0
    for result in found["results"]:
        blocks = result["resumed"]["blocks"]
        assert blocks == list(range(blocks[0], BLOCKS)), result
        if result["left"] != found["files"]:  # else the model was there already, and what was kept was going
            assert blocks[0] >= start, result
            start = blocks[0]
        assert result["same"], result
        assert result["beside"] == ["out"], result
        assert result["left"] in (None, ["config.json"] if old else None, found["files"]), result
    return start


@pytest.mark.parametrize("settings", [QUICK, {"recipe": "rtn", "bits": 3, "offload": True}, QOQ], ids=str)
def test_a_killed_run_goes_on_to_the_same_bytes(model, tmp_path, settings):
    found = killed(model, tmp_path, 1, 11, **settings)
    assert len(found["results"]) >= found["steps"] // 11
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["new", "old-there"])
@pytest.mark.parametrize("settings", [QUICK, {"recipe": "rtn", "bits": 3, "offload": True}, QOQ], ids=str)
def test_whatever_step_it_was_killed_at(model, tmp_path, settings, old):
    found = killed(model, tmp_path, 0, 1, old=old, **settings)
    assert len(found["results"]) >= found["steps"]  # replacing an old model takes some more
    assert check(found, old=old) == BLOCKS - 1


OTHERS = [
    {"bits": 3},
    pytest.param({"settings": {"scale_points": 2, "clip_steps": 2}}, marks=pytest.mark.slow),
    pytest.param({"symmetric": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("after", OTHERS, ids=str)
def test_another_job_starts_anew(model, tmp_path, after):
    found = killed(model, tmp_path, 29, 1000, after=after, **QUICK)
    (result,) = found["results"]
    assert result["resumed"]["blocks"] == list(range(BLOCKS))
    assert result["same"]
    assert result["beside"] == ["out"]
