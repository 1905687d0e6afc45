"""A real vLLM engine on a tiny AWQ checkpoint: the plugin is found, named, run, and computes the right model.

One engine start serves all tests; the checkpoint's weights are also at hand dequantized, for Transformers to run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

TIMEOUT_S = 300


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def session(tiny_llama, vllm_environment, tmp_path_factory):
    result = tmp_path_factory.mktemp("session") / "seen.json"
    script = Path(__file__).with_name("engine_session.py")
    run(
        [sys.executable, str(script), str(tiny_llama.awq), str(tiny_llama.dequantized), str(result)],
        vllm_environment,
    )
    return json.loads(result.read_text())


def test_log_probabilities_are_those_of_the_dequantized_model(session):
    assert session["worst_logprob_error"] < 1e-3


def test_greedy_tokens_are_those_of_the_dequantized_model(session):
    assert session["smallest_margin"] > 1e-3, "two tokens are too close for this to prove anything: change the seed"
    assert session["tokens"] == session["greedy_of_reference"]
    assert session["text"].split() == [f"t{token}" for token in session["tokens"][0]]


def test_vllm_keeps_its_own_awq_unless_the_user_names_ours(session):
    assert session["method_unless_named"] == "awq"
    assert session["method_when_named"] == "kernelgraft_awq"


def test_exactly_the_quantized_layers_are_ours(session):
    ours = {name for name, method in session["methods"].items() if method == "KernelgraftAWQLinearMethod"}
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert ours == {f"model.layers.{index}.{name}" for index in (0, 1) for name in names}
    assert session["methods"]["lm_head"] != "KernelgraftAWQLinearMethod"


def test_every_quantized_layer_runs_on_our_op_at_every_step(session):
    steps, layers = 8, 2
    shapes = ("128x256", "128x128", "128x512", "256x128")  # qkv, o, gate with up, down
    assert session["calls"] == dict.fromkeys(shapes, steps * layers)


@pytest.mark.parametrize(("allowed", "offered"), [("awq", True), ("mm-sp", False)])
def test_the_allow_list_hides_the_method_from_vllm(vllm_environment, allowed, offered):
    script = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "print('kernelgraft_awq' in QUANTIZATION_METHODS)"
    )
    printed = run([sys.executable, "-c", script], vllm_environment | {"KERNELGRAFT_PLUGINS": allowed})
    assert printed.split()[-1] == str(offered)
