"""vLLM's OpenAI server, in its usual several processes: each of them has to find the plugin by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

READY_WITHIN_S = 300
PROMPT, NEW_TOKENS = [3, 5, 7, 11], 8


def request(url: str, body: dict[str, object] | None = None) -> dict[str, object]:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read() or "{}")


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """The greedy continuation by the dequantized model in Transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama.dequantized, dtype=torch.float32)
    tokens = list(PROMPT)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return [f"t{token}" for token in tokens[len(PROMPT) :]]


@pytest.fixture(params=[1, 2], ids=["one-rank", "two-ranks"])
def server(request, tiny_llama, vllm_environment, tmp_path):
    cores = sorted(os.sched_getaffinity(0))[: request.param]
    if len(cores) < request.param:
        pytest.skip(f"{request.param} ranks need a core each")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_llama.quantized)]
    command += ["--quantization", "kernelgraft_awq", "--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--tensor-parallel-size", str(len(cores))]
    environment = vllm_environment | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores)),
    }
    log, url = tmp_path / "server.log", f"http://127.0.0.1:{port}"
    with log.open("w") as sink, subprocess.Popen(command, env=environment, stdout=sink, stderr=sink) as process:
        try:
            wait_until_ready(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(url, process, log) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            request(f"{url}/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not come up:\n{log.read_text()[-4000:]}")
            time.sleep(1)


def test_completions_are_those_of_the_dequantized_model(server, expected):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = request(f"{server}/v1/completions", body)
    assert answer["choices"][0]["text"].split() == expected
