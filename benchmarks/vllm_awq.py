"""Decoding speed inside vLLM on a CPU: the same AWQ checkpoint by our layers and by vLLM's own.

python -m benchmarks.vllm_awq --threads 1 --out benchmarks/results/vllm-awq-<machine>-<date>.json

Two engines, one with ``quantization="kernelgraft_awq"`` and one with ``"awq"`` (CPUWNA16LinearKernel), run in processes
of their own with the same number of threads. They take turns round by round; while one runs the other waits. A sample
is the tokens that a batch of prompts decodes greedily in a round, divided by the time of the engine's steps after every
prompt has its first token. What both wrote is compared token by token, and so are log-probabilities as far as they
wrote the same; both are also held against the same weights as a float32 model of Transformers. The model is by default
SmolLM2-135M, rounded to 4 bits with group size 64 and kept in the cache.

Exit status: 0 measured, 1 an engine cannot run or does not use the layers it should, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernelgraft_core.runtime.plans import cache_directory
from kernelgraft_core.runtime.timing import Times, environment

from .checkpoints import float_model
from .run import write_json

OURS, THEIRS = "kernelgraft_awq", "awq"
LAYERS = {OURS: "KernelgraftAWQLinearMethod", THEIRS: "CPUWNA16LinearKernel"}
TOP = 5  # log-probabilities that are compared at each position
PROMPTS = (
    "The history of computing began with",
    "In the morning the harbour was quiet, and",
    "To cook rice well, first",
    "The three laws of motion say that",
    "She opened the letter and read:",
    "A list of the largest rivers in the world:",
    "Water boils at a lower temperature on a mountain because",
    "Dear colleagues, I would like to",
)


class EngineError(RuntimeError):
    """An engine ended, or does not run what is to be measured; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What both engines are told.

    Attributes:
        threads: of OpenMP.
        tokens: decoded for each prompt in a round, after its first.
        compiled: vLLM's default; else ``enforce_eager``, which starts sooner.
    """

    model: str
    threads: int
    tokens: int
    compiled: bool


class Engine:
    """A vLLM engine in another process that answers one question at a time."""

    def __init__(self, method: str, settings: Settings) -> None:
        self.method = method
        threads = str(settings.threads)
        inherited = {k: v for k, v in os.environ.items() if k not in ("KERNELGRAFT_PLUGINS", "VLLM_PLUGINS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--engine", method, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=inherited
            | {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": inherited.get("VLLM_CPU_KVCACHE_SPACE", "1"),
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": inherited.get("VLLM_LOGGING_LEVEL", "ERROR"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": threads,
            },
        )
        self.about = self._answer()

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the engine with {self.method} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise EngineError(f"the engine with {self.method}: {answer['error']}")
        return answer


def serve(method: str, settings: Settings) -> None:
    """In the other process: start the engine, then answer questions from standard input until it closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever vLLM prints goes to standard error

    from vllm import LLM, SamplingParams

    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    llm = LLM(
        model=settings.model,
        quantization=method,
        enforce_eager=not settings.compiled,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=max(8, len(PROMPTS)),
    )
    engine: Any = llm.llm_engine
    kinds = llm.apply_model(_layer_kinds)[0]
    about = {
        "start_seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "layers": kinds,
    }
    if not any(LAYERS[method] in kind for kind in kinds):
        about = {"error": f"no layer is a {LAYERS[method]}: {kinds}"}
    if method == THEIRS and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        about = {"error": "this build of vLLM has no cpu_gemm_wna16 for this processor"}
    channel.write(json.dumps(about) + "\n")

    for line in sys.stdin:
        question = json.loads(line)
        greedy = SamplingParams(
            temperature=0,
            max_tokens=1 + settings.tokens,
            min_tokens=1 + settings.tokens,
            ignore_eos=True,
            logprobs=TOP if question["logprobs"] else None,
        )
        channel.write(json.dumps(_decode(engine, PROMPTS[: question["batch"]], greedy)) + "\n")


def _layer_kinds(model: torch.nn.Module) -> dict[str, int]:
    """How many layers are computed by which method, and by which kernel where the method has one."""
    kinds: dict[str, int] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            kernel = getattr(method, "kernel", None)
            name = type(method).__name__ + (f" {type(kernel).__name__}" if kernel is not None else "")
            kinds[name] = kinds.get(name, 0) + 1
    return kinds


def _decode(engine: Any, prompts: tuple[str, ...], greedy: Any) -> dict[str, Any]:
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, greedy)
    outputs: dict[int, Any] = {}
    steps, decoded = [], 0
    while engine.has_unfinished_requests():
        before = sum(len(output.outputs[0].token_ids) for output in outputs.values())
        prefilled = len(outputs) == len(prompts)
        started = time.perf_counter()
        for output in engine.step():
            outputs[int(output.request_id.split("-")[0])] = output
        elapsed = time.perf_counter() - started
        if prefilled:
            steps.append(elapsed)
            decoded += sum(len(output.outputs[0].token_ids) for output in outputs.values()) - before
    completions = [outputs[index].outputs[0] for index in range(len(prompts))]
    logprobs = [
        [{token: entry.logprob for token, entry in position.items()} for position in completion.logprobs or ()]
        for completion in completions
    ]
    return {
        "tokens_per_second": decoded / sum(steps),
        "decoded": decoded,
        "prompts": [list(outputs[index].prompt_token_ids) for index in range(len(prompts))],
        "tokens": [list(completion.token_ids) for completion in completions],
        "text": [completion.text for completion in completions],
        "logprobs": logprobs,
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far both wrote the same, and how much log-probabilities of the same tokens differ until then.

    ``margins``: where they part, how much likelier vLLM's own layers find their token than ours.
    """
    same, parted, margins, worst = 0, [], [], 0.0
    for index, (left, right) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        length = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))
        same += length == len(left)
        for a, b in zip(ours["logprobs"][index][: length + 1], theirs["logprobs"][index][: length + 1], strict=True):
            worst = max(worst, *(abs(a[token] - b[token]) for token in a.keys() & b.keys()))
        if length < len(left):
            parted.append(length)
            entry = theirs["logprobs"][index][length]
            ranked = sorted(entry.values(), reverse=True)
            margins.append(round(ranked[0] - entry.get(str(left[length]), ranked[-1]), 4))
    return {
        "same_text": same,
        "prompts": len(ours["tokens"]),
        "tokens_before_they_part": parted,
        "margins": margins,
        "largest_logprob_difference": round(worst, 4),
    }


def errors(exact: Any, written: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities of an engine's likeliest tokens against the float32 model on the same text."""
    differences = []
    for prompt, tokens, logprobs in zip(written["prompts"], written["tokens"], written["logprobs"], strict=True):
        with torch.inference_mode():
            logits = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        for row, found in zip(logits.log_softmax(-1), logprobs, strict=True):
            differences += [abs(row[int(token)].item() - logprob) for token, logprob in found.items()]
    return {"mean": round(statistics.mean(differences), 4), "largest": round(max(differences), 4)}


def measure(engines: dict[str, Engine], exact: Any, batch: int, rounds: int) -> dict[str, Any]:
    """One result: what both wrote, and tokens per second of both, in turns."""
    written = {method: engine.ask(batch=batch, logprobs=True) for method, engine in engines.items()}
    samples: dict[str, list[float]] = {method: [] for method in engines}
    for turn in range(rounds):
        for method in list(engines)[:: 1 if turn % 2 == 0 else -1]:
            answer = engines[method].ask(batch=batch, logprobs=False)
            samples[method].append(answer["tokens_per_second"])
    result: dict[str, Any] = {"batch": batch, "rounds": rounds, "compared": compare(written[OURS], written[THEIRS])}
    result["logprob_errors"] = {method: errors(exact, answer) for method, answer in written.items()}
    result["text"] = {method: answer["text"][0] for method, answer in written.items()}
    result["tokens_per_second"] = {}
    for method, taken in samples.items():
        times = Times.of(taken).as_dict()
        times["max"] = round(max(taken), 3)
        result["tokens_per_second"][method] = times
    medians = [result["tokens_per_second"][method]["p50"] for method in (OURS, THEIRS)]
    result["speedup"] = round(medians[0] / medians[1], 3)
    return result


def default_model() -> Path:
    """SmolLM2-135M in AutoAWQ's layout, made once: speed does not depend on how the weights were chosen."""
    path = cache_directory() / "models" / "smollm2-135m-instruct-rtn-w4g64"
    if not (path / "config.json").exists():
        from kernelgraft_transformers.smollm2 import materialize

        options = "--recipe rtn --group-size 64 --samples 2 --seqlen 64 --overwrite"
        command = [sys.executable, "-m", "kernelgraft", "quantize", str(materialize(cache_directory()))]
        subprocess.run([*command, "--out", str(path), *options.split()], check=True, stdout=sys.stderr)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.vllm_awq", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of an AutoAWQ checkpoint; default: SmolLM2-135M")
    parser.add_argument("--batch", type=int, action="append", help="prompts at a time, 1 to 8; default 1 and 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10, help="samples of each engine")
    parser.add_argument("--tokens", type=int, default=48, help="decoded for each prompt in a round")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does by default; starts slowly")
    parser.add_argument("--out", type=Path, help="JSON file; without it only the table is printed")
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.engine:
        serve(given.engine[0], Settings(**json.loads(given.engine[1])))
        return 0
    batches = given.batch or [1, 8]
    bounds = {"threads": 1024, "rounds": 1000, "tokens": 400}
    wrong = [
        f"--{name} {getattr(given, name)}" for name, most in bounds.items() if not 1 <= getattr(given, name) <= most
    ]
    wrong += [f"--batch {batch}" for batch in batches if not 1 <= batch <= len(PROMPTS)]
    if wrong:
        print(f"benchmarks.vllm_awq: out of range: {', '.join(wrong)}", file=sys.stderr)
        return 2
    settings = Settings(str(given.model or default_model()), given.threads, given.tokens, given.compile)
    torch.set_num_threads(given.threads)
    env = environment()
    engines: dict[str, Engine] = {}
    try:
        for method in (OURS, THEIRS):
            engines[method] = Engine(method, settings)
        exact, results = float_model(Path(settings.model)), []
        for batch in batches:
            results.append(measure(engines, exact, batch, given.rounds))
            print(_row(results[-1]), flush=True)
    except (EngineError, ValueError) as error:
        print(f"benchmarks.vllm_awq: {error}", file=sys.stderr)
        return 1
    finally:
        for engine in engines.values():
            engine.close()
    if given.out:
        document = {
            "schema": 1,
            "benchmark": "vllm_awq",
            "env": env | {"load_after": [round(value, 2) for value in os.getloadavg()]},
            "settings": asdict(settings)
            | {"model": Path(settings.model).name, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT")},
            "engines": {method: engine.about for method, engine in engines.items()},
            "results": results,
        }
        write_json(document, given.out)
    return 0


def _row(result: dict[str, Any]) -> str:
    speeds = ", ".join(
        f"{method} {times['p50']:.1f} (p20 {times['p20']:.1f}, p80 {times['p80']:.1f})"
        for method, times in result["tokens_per_second"].items()
    )
    compared = result["compared"]
    off = ", ".join(f"{method} {error['mean']}" for method, error in result["logprob_errors"].items())
    return (
        f"batch {result['batch']}: tokens/s {speeds}: {result['speedup']:.2f}x\n  same text for "
        f"{compared['same_text']} of {compared['prompts']} prompts; log-probabilities differ by "
        f"{compared['largest_logprob_difference']} at most, and from float32 by {off} on average"
    )


if __name__ == "__main__":
    sys.exit(main())
