"""A vLLM engine on a CPU in a process of its own, which decodes prompts when it is asked to: for benchmarks that let
several take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernelgraft_core.runtime.plans import cache_directory
from kernelgraft_core.runtime.timing import Times, environment

from .checkpoints import float_model
from .run import write_json

TOP = 5  # log-probabilities that are given at each position
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
class Variant:
    """What an engine runs.

    Attributes:
        name: for tables and messages.
        model: directory of the checkpoint.
        layer: part of what computes its linear layers is called; an engine without such layers is an error.
        quantization, kv_cache_dtype: as vLLM takes them; None for what the checkpoint says.
    """

    name: str
    model: str
    layer: str
    quantization: str | None = None
    kv_cache_dtype: str | None = None


@dataclass(frozen=True)
class Settings:
    """What all engines are told.

    Attributes:
        threads: of OpenMP.
        tokens: decoded for each prompt in a round, after its first.
        compiled: vLLM's default; else ``enforce_eager``, which starts sooner.
    """

    threads: int
    tokens: int
    compiled: bool


class Engine:
    """A vLLM engine in another process that answers one question at a time."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        self.name = variant.name
        threads = str(settings.threads)
        inherited = {k: v for k, v in os.environ.items() if k not in ("KERNELGRAFT_PLUGINS", "VLLM_PLUGINS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(asdict(variant)), json.dumps(asdict(settings))],
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
            raise EngineError(f"the engine {self.name} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise EngineError(f"the engine {self.name}: {answer['error']}")
        return answer


@contextmanager
def running(variants: list[Variant], settings: Settings) -> Iterator[dict[str, Engine]]:
    """One engine for each variant, by name."""
    engines: dict[str, Engine] = {}
    try:
        for variant in variants:
            engines[variant.name] = Engine(variant, settings)
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def serve(variant: Variant, settings: Settings) -> None:
    """In the other process: start the engine, then answer questions from standard input until it closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever vLLM prints goes to standard error

    from vllm import LLM, SamplingParams

    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    llm = LLM(
        model=variant.model,
        quantization=variant.quantization,
        **({"kv_cache_dtype": variant.kv_cache_dtype} if variant.kv_cache_dtype else {}),
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
        "cached_tokens": engine.vllm_config.cache_config.num_gpu_blocks * engine.vllm_config.cache_config.block_size,
    }
    if not any(variant.layer in kind for kind in kinds):
        about = {"error": f"no layer is a {variant.layer}: {kinds}"}
    if variant.quantization == "awq" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
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


def in_turns(engines: dict[str, Engine], batch: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every engine, round by round."""
    samples: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(engines[name].ask(batch=batch, logprobs=False)["tokens_per_second"])
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Of tokens per second."""
    return Times.of(samples).as_dict() | {"max": round(max(samples), 3)}


def errors(exact: Any, written: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities of an engine's likeliest tokens against the float32 model on the same text."""
    differences = []
    for prompt, tokens, logprobs in zip(written["prompts"], written["tokens"], written["logprobs"], strict=True):
        with torch.inference_mode():
            logits = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        for row, found in zip(logits.log_softmax(-1), logprobs, strict=True):
            differences += [abs(row[int(token)].item() - logprob) for token, logprob in found.items()]
    return {"mean": round(statistics.mean(differences), 4), "largest": round(max(differences), 4)}


def quantized_smollm2(recipe: str, options: str) -> Path:
    """SmolLM2-135M at group size 64 by a recipe of ``kernelgraft quantize``, made once and kept."""
    from kernelgraft_transformers.smollm2 import materialize

    path = cache_directory() / "models" / f"smollm2-135m-instruct-{recipe}-w4g64"
    if not (path / "config.json").exists():
        command = [sys.executable, "-m", "kernelgraft", "quantize", str(materialize(cache_directory()))]
        subprocess.run(
            [*command, "--out", str(path), "--recipe", recipe, "--overwrite", *options.split()],
            check=True,
            stdout=sys.stderr,
        )
    return path


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of engines is told on the command line."""
    parser.add_argument("--batch", type=int, action="append", help="prompts at a time, 1 to 8; default 1 and 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10, help="samples of each engine")
    parser.add_argument("--tokens", type=int, default=48, help="decoded for each prompt in a round")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does by default; starts slowly")
    parser.add_argument("--out", type=Path, help="JSON file; without it only the table is printed")


def run(
    benchmark: str,
    given: argparse.Namespace,
    find_variants: Callable[[], list[Variant]],
    measure: Callable[[dict[str, Engine], dict[str, Any], int], dict[str, Any]],
    describe: Callable[[dict[str, Any], dict[str, Engine]], str],
) -> int:
    """What the benchmark does once its arguments are parsed; the exit status.

    Args:
        measure: engines, the float32 model of each by name, and the batch, to one result.
        describe: what is printed of it.
    """
    try:
        batches, settings = read_options(given)
    except ValueError as error:
        print(f"benchmarks.{benchmark}: {error}", file=sys.stderr)
        return 2
    env, variants, results = environment(), find_variants(), []
    try:
        with running(variants, settings) as engines:
            models = {path: float_model(Path(path)) for path in {variant.model for variant in variants}}
            exact = {variant.name: models[variant.model] for variant in variants}
            for batch in batches:
                results.append(measure(engines, exact, batch))
                print(describe(results[-1], engines), flush=True)
            if given.out:
                write_results(benchmark, env, settings, variants, engines, results, given.out)
    except (EngineError, ValueError) as error:
        print(f"benchmarks.{benchmark}: {error}", file=sys.stderr)
        return 1
    return 0


def read_options(given: argparse.Namespace) -> tuple[list[int], Settings]:
    """Batches and settings.

    Raises:
        ValueError: numbers are out of range; the message names them.
    """
    batches = given.batch or [1, 8]
    bounds = {"threads": 1024, "rounds": 1000, "tokens": 400}
    wrong = [
        f"--{name} {getattr(given, name)}" for name, most in bounds.items() if not 1 <= getattr(given, name) <= most
    ]
    wrong += [f"--batch {batch}" for batch in batches if not 1 <= batch <= len(PROMPTS)]
    if wrong:
        raise ValueError(f"out of range: {', '.join(wrong)}")
    torch.set_num_threads(given.threads)
    return batches, Settings(given.threads, given.tokens, given.compile)


def write_results(
    benchmark: str, env: dict[str, Any], settings: Settings, variants: list[Variant], engines: dict[str, Engine],
    results: list[dict[str, Any]], out: Path,
) -> None:  # fmt: skip
    """One JSON file."""
    described = {variant.name: asdict(variant) | {"model": Path(variant.model).name} for variant in variants}
    document = {
        "schema": 1,
        "benchmark": benchmark,
        "env": env | {"load_after": [round(value, 2) for value in os.getloadavg()]},
        "settings": asdict(settings) | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT")},
        "engines": {name: described[name] | engine.about for name, engine in engines.items()},
        "results": results,
    }
    write_json(document, out)


if __name__ == "__main__":
    serve(Variant(**json.loads(sys.argv[1])), Settings(**json.loads(sys.argv[2])))
