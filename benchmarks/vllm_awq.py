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
import functools
import sys
from pathlib import Path
from typing import Any

from .vllm_engines import Engine, Variant, add_options, errors, in_turns, quantized_smollm2, run, summary

OURS, THEIRS = "kernelgraft_awq", "awq"
LAYERS = {OURS: "KernelgraftAWQLinearMethod", THEIRS: "CPUWNA16LinearKernel"}


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


def find_variants(model: Path | None) -> list[Variant]:
    """What is compared; quantizes SmolLM2 where no model is given and that has not been done."""
    # Speed does not depend on how the weights were chosen.
    directory = str(model or quantized_smollm2("rtn", "--group-size 64 --samples 2 --seqlen 64"))
    return [Variant(method, directory, layer, quantization=method) for method, layer in LAYERS.items()]


def measure(rounds: int, engines: dict[str, Engine], exact: dict[str, Any], batch: int) -> dict[str, Any]:
    """One result: what both wrote, and tokens per second of both, in turns."""
    written = {method: engine.ask(batch=batch, logprobs=True) for method, engine in engines.items()}
    samples = in_turns(engines, batch, rounds)
    result: dict[str, Any] = {"batch": batch, "rounds": rounds, "compared": compare(written[OURS], written[THEIRS])}
    result["logprob_errors"] = {method: errors(exact[method], answer) for method, answer in written.items()}
    result["text"] = {method: answer["text"][0] for method, answer in written.items()}
    result["tokens_per_second"] = {method: summary(taken) for method, taken in samples.items()}
    medians = [result["tokens_per_second"][method]["p50"] for method in (OURS, THEIRS)]
    result["speedup"] = round(medians[0] / medians[1], 3)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.vllm_awq", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of an AutoAWQ checkpoint; default: SmolLM2-135M")
    add_options(parser)
    given = parser.parse_args(arguments)
    return run("vllm_awq", given, lambda: find_variants(given.model), functools.partial(measure, given.rounds), _row)


def _row(result: dict[str, Any], engines: dict[str, Engine]) -> str:
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
