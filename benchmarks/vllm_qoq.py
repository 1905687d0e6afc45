"""Decoding speed inside vLLM on a CPU: QoQ, with a 16-bit and with a 4-bit cache, beside vLLM's own bfloat16 and AWQ.

python -m benchmarks.vllm_qoq --threads 1 --compile --out benchmarks/results/vllm-qoq-<machine>-<date>.json

Four engines in processes of their own, with the same settings and number of threads, take turns round by round: the
model as it is, an AWQ checkpoint on vLLM's own layers, a QoQ checkpoint, and the latter with
``--kv-cache-dtype int4_per_token_head``. A sample is the tokens that a batch of prompts decodes greedily in a round,
divided by the time of the engine's steps after every prompt has its first token. Log-probabilities of what each wrote
are held against the float32 model with its weights, and the tokens that its cache holds are in the result. The model is
SmolLM2-135M, quantized at group size 64 at the first run (a few minutes) and kept in the cache.

Exit status: 0 measured, 1 an engine cannot run or does not use the layers it should, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from kernelgraft_core.runtime.plans import cache_directory

from .vllm_engines import Engine, Variant, add_options, errors, in_turns, quantized_smollm2, run, summary

STOCK, AWQ, QOQ, QOQ_KV4 = "bf16", "awq", "qoq", "qoq, KV4"


def find_variants() -> list[Variant]:
    """What is compared; quantizes the model where that has not been done."""
    from kernelgraft_transformers.smollm2 import materialize

    whole = str(materialize(cache_directory()))
    awq = str(quantized_smollm2("rtn", "--group-size 64 --samples 2 --seqlen 64"))
    qoq = str(quantized_smollm2("qoq-g64", "--samples 8"))
    return [
        Variant(STOCK, whole, "UnquantizedLinearMethod"),
        Variant(AWQ, awq, "CPUWNA16LinearKernel", quantization="awq"),
        Variant(QOQ, qoq, "KernelgraftQoQLinearMethod"),
        Variant(QOQ_KV4, qoq, "KernelgraftQoQLinearMethod", kv_cache_dtype="int4_per_token_head"),
    ]


def measure(rounds: int, engines: dict[str, Engine], exact: dict[str, Any], batch: int) -> dict[str, Any]:
    """One result: how exact each engine is, and tokens per second of all, in turns."""
    written = {name: engine.ask(batch=batch, logprobs=True) for name, engine in engines.items()}
    speeds = {name: summary(taken) for name, taken in in_turns(engines, batch, rounds).items()}
    return {
        "batch": batch,
        "rounds": rounds,
        "logprob_errors": {name: errors(exact[name], answer) for name, answer in written.items()},
        "text": {name: answer["text"][0] for name, answer in written.items()},
        "tokens_per_second": speeds,
        "speedup": {
            name: {peer: round(speeds[name]["p50"] / speeds[peer]["p50"], 3) for peer in (STOCK, AWQ)}
            for name in (QOQ, QOQ_KV4)
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.vllm_qoq", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    given = parser.parse_args(arguments)
    return run("vllm_qoq", given, find_variants, functools.partial(measure, given.rounds), _table)


def _table(result: dict[str, Any], engines: dict[str, Engine]) -> str:
    lines = [f"batch {result['batch']}"]
    for name, speed in result["tokens_per_second"].items():
        ratios = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in result["speedup"].get(name, {}).items())
        lines.append(
            f"  {name:10} {speed['p50']:8.1f} tokens/s (p20 {speed['p20']:.1f}, p80 {speed['p80']:.1f})  "
            f"{engines[name].about['cached_tokens']:8} tokens cached  "
            f"log-probabilities off by {result['logprob_errors'][name]['mean']}  {ratios}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
