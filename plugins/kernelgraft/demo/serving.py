"""Models served in processes of their own (:mod:`.worker`), asked and timed from here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kernelgraft.errors import KernelgraftError
from kernelgraft.hookspecs import HostRequirement
from kernelgraft.hosts import inspect_host

from .sections import Context, Dialogue

QUESTIONS = ("What is the capital of France?", "Why is the sky blue? Answer in two sentences.")
ANSWER_TOKENS = 64
TIMEOUT_S = 600  # for one answer; a start or a first compilation on a busy machine takes a minute
ENGINES = ("auto", "vllm", "transformers")

# Small enough for any machine, silent and without network; what the user has set stays.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServingError(KernelgraftError, RuntimeError):
    """A serving process failed; the message gives its last words and its log."""


@dataclass(frozen=True)
class Host:
    """The host that serves: ``engine`` for the worker, ``name`` for the reader, ``reason`` why it is not vLLM."""

    engine: str
    name: str
    reason: str | None = None


def choose_host(engine: str, vllm: HostRequirement) -> Host:
    """vLLM where a version in the range is installed, Transformers elsewhere; or what the user asks for.

    Raises:
        ValueError: ``engine`` is none of :data:`ENGINES`, or vLLM is asked for and is not usable; the message says why.
    """
    if engine not in ENGINES:
        raise ValueError(f"no engine {engine!r}; there are {', '.join(ENGINES)}")
    status = inspect_host(vllm)
    found = f"{status.distribution} {status.version} is {status.problem}" if status.version else "vLLM is not installed"
    if engine == "vllm" and not status.ok:
        raise ValueError(f"vLLM cannot serve: {found}; tested are versions {vllm.specifier}")
    if engine != "transformers" and status.ok:
        return Host("vllm", f"{status.distribution} {status.version}")
    from importlib.metadata import version

    reason = None if engine == "transformers" else found
    return Host("transformers", f"Transformers {version('transformers')}", reason)


class Server:
    """One model in one process. ``log`` receives everything that its host prints.

    Attributes:
        facts: what the worker said of itself: ``load_seconds``, ``weight_bytes``, ``grafted_layers``; after
            :meth:`close` also ``peak_bytes`` and ``peak_gpu_bytes``.
    """

    def __init__(
        self, engine: str, model: Path, log: Path, quantization: str | None = None, cache: str | None = None
    ) -> None:
        command = [sys.executable, "-m", "kernelgraft.demo.worker", "--engine", engine, "--model", str(model)]
        if quantization:
            command += ["--quantization", quantization]
        if cache:
            command += ["--cache", cache]
        self._model, self._log = model, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=_ENVIRONMENT | os.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        try:
            self.facts: dict[str, Any] = self._receive()
        except BaseException:
            self.kill()
            raise

    def ask(self, question: str, most: int, *, least: int = 0) -> dict[str, Any]:
        """A greedy answer of ``least`` to ``most`` tokens: ``text``, ``tokens``, ``prompt_tokens`` and ``seconds``.

        Raises:
            ServingError: the process died or took longer than :data:`TIMEOUT_S`.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading finds out, and knows the exit code
            self._process.stdin.write(json.dumps({"question": question, "least": least, "most": most}) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process in good order, which tells how much memory it needed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.facts |= self._receive()
        try:
            self._process.wait(timeout=60)  # engines take their time to say goodbye
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            raise ServingError(
                f"the process that served {self._model} ended with code {code}: {_last_words(self._log)} "
                f"(its output is in {self._log})"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Candidate:
    """A model to serve: ``title`` for the reader, its directory, and the types of weights and cache for the host."""

    title: str
    model: Path
    quantization: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class Served:
    """What served models said of themselves, how many tokens they decode in a second, and what they answered."""

    facts: dict[str, dict[str, Any]]
    speeds: dict[str, float]
    dialogues: tuple[Dialogue, ...]


def serve(context: Context, host: Host, candidates: dict[str, Candidate], log: str) -> Served:
    """All of them at the same time, each in a process of its own; ``log`` begins the names of their logs.

    Raises:
        ServingError: one of them failed. No process is left.
    """
    step, effort = context.steps.step, context.effort
    servers: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:
        for name, candidate in candidates.items():
            with step(f"Starting {host.name}, {candidate.title}"):
                server = Server(
                    host.engine,
                    candidate.model,
                    context.logs / f"{log}-{name}.log",
                    candidate.quantization,
                    candidate.cache,
                )
                stack.callback(server.kill)
                servers[name] = server
        with step("Asking all"):
            dialogues = tuple(
                Dialogue(q, {candidates[n].title: s.ask(q, ANSWER_TOKENS)["text"] for n, s in servers.items()})
                for q in QUESTIONS
            )
        with step("Measuring their speed in turns"):
            speeds = tokens_per_second(servers, QUESTIONS[0], effort.new_tokens, effort.rounds)
        for server in servers.values():
            server.close()
    return Served({name: server.facts for name, server in servers.items()}, speeds, dialogues)


def tokens_per_second(servers: dict[str, Server], question: str, tokens: int, rounds: int) -> dict[str, float]:
    """Decoding speed of each server, one request at a time, in turns: a machine that slows down slows all of them.

    The time of the prompt is measured by itself and taken off. The median over the rounds counts.
    """
    speeds: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            prompt = server.ask(question, 1, least=1)["seconds"]
            answer = server.ask(question, tokens + 1, least=tokens + 1)
            speeds[name].append((answer["tokens"] - 1) / max(answer["seconds"] - prompt, 1e-6))
    return {name: median(taken) for name, taken in speeds.items()}


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
