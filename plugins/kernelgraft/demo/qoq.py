"""QoQ on a real model: 4-bit weights, 8-bit activations and a 4-bit cache beside the unquantized model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelgraft.cli.console import count_bytes

from . import plots, serving
from .awq import ROUNDING_SAMPLES
from .models import load, materialize, measure_perplexity, quantize
from .sections import Context, Figure, Section, SectionResult, Table
from .worker import FOUR_BITS

NAMES = {"original": "original", "rtn": "rounded to nearest", "w4a8": "QoQ, W4A8", "w4a8kv4": "QoQ, W4A8KV4"}
COLORS = {"original": plots.GRAY, "rtn": plots.ORANGE, "w4a8": plots.BLUE, "w4a8kv4": plots.BLUE}
SERVED = {"original": (None, None), "w4a8": ("qoq", None), "w4a8kv4": ("qoq", FOUR_BITS)}
GROUP_SIZE = 64  # the widths of SmolLM2 are no multiples of 128


@dataclass(frozen=True)
class Found:
    """Perplexity by model, its tokens, the checkpoint's record; then what serving showed, None where it failed."""

    perplexity: dict[str, float]
    tokens: int
    record: dict[str, Any]
    served: serving.Served | None = None


def run(context: Context) -> SectionResult:
    import kernelgraft

    handle = kernelgraft.load_plugin("qoq", host="transformers")
    vllm = next(host for host in handle.info.hosts if host.module == "vllm")
    host = serving.choose_host(context.engine, vllm)
    original = context.model or materialize(context)
    models = {"original": original, "rtn": context.work / "rtn", "w4a8": context.work / "qoq"}
    models["w4a8kv4"] = models["w4a8"]
    found = _measure_quality(context, models)
    failures: tuple[str, ...] = ()
    candidates = {
        name: serving.Candidate(NAMES[name], models[name], method, cache) for name, (method, cache) in SERVED.items()
    }
    try:
        found = replace(found, served=serving.serve(context, host, candidates, "serve-qoq"))
    except serving.ServingError as error:
        failures = (str(error),)
    return _summarize(context, models, host, found, failures)


SECTION = Section("qoq", "QoQ: 4-bit weights, 8-bit activations, 4-bit cache", run)


def _measure_quality(context: Context, models: dict[str, Path]) -> Found:
    import kernelgraft
    from kernelgraft_core.quant.architectures import find_architecture
    from kernelgraft_core.quant.qoq import as_served
    from kernelgraft_transformers.quantize import load_source
    from kernelgraft_transformers.texts import encode

    effort = context.effort
    source = load_source(str(models["original"]))
    tokens = encode(source.tokenizer, context.measured.content)
    found = {"original": measure_perplexity(context, load(context, models["original"]), tokens, NAMES["original"])}
    rounding = min(effort.samples, ROUNDING_SAMPLES)
    quantize(context, source, models["rtn"], "rtn", rounding, NAMES["rtn"], group_size=GROUP_SIZE)
    record = quantize(context, source, models["w4a8"], f"qoq-g{GROUP_SIZE}", effort.samples, "QoQ")
    with kernelgraft.load_plugin("awq", host="transformers"):  # which holds plain 4-bit weights
        found["rtn"] = measure_perplexity(context, load(context, models["rtn"]), tokens, NAMES["rtn"])
    model = load(context, models["w4a8"])
    found["w4a8"] = measure_perplexity(context, model, tokens, NAMES["w4a8"])
    architecture = find_architecture(model)
    with as_served(architecture, architecture.block_list(model), activations=False):  # the layers round them themselves
        found["w4a8kv4"] = measure_perplexity(context, model, tokens, NAMES["w4a8kv4"])
    return Found(found, min(effort.windows, len(tokens) // effort.length) * effort.length, record)


def _summarize(
    context: Context, models: dict[str, Path], host: serving.Host, found: Found, failures: tuple[str, ...]
) -> SectionResult:
    from kernelgraft_transformers.checkpoint import describe

    sizes, served = {name: describe(path)["bytes"] for name, path in models.items()}, found.served
    return SectionResult(
        verdict=_verdict(found, sizes),
        table=_table(found, sizes),
        figures=_figures(found),
        dialogues=served.dialogues if served else (),
        notes=_notes(context, host, found),
        commands=_commands(context, models, found),
        failures=failures,
        data={
            "perplexity": found.perplexity,
            "perplexity_tokens": found.tokens,
            "file_bytes": sizes,
            "host": host.name,
            "tokens_per_second": served.speeds if served else None,
            "serving": served.facts if served else None,
            "dialogues": [{"question": d.question, "answers": d.answers} for d in served.dialogues] if served else [],
            "record": found.record,
        },
    )


def _capacity(found: Found) -> float | None:
    """How many times as many tokens a 4-bit cache holds; None where the host does not say."""
    if found.served is None or "cached_tokens" not in found.served.facts["original"]:
        return None
    facts = found.served.facts
    return float(facts["w4a8kv4"]["cached_tokens"] / facts["original"]["cached_tokens"])


def _verdict(found: Found, sizes: dict[str, int]) -> str:
    values = found.perplexity
    parts = [
        f"In W4A8KV4 the model's perplexity goes from {values['original']:.2f} to {values['w4a8kv4']:.2f}, where "
        f"weights alone rounded to nearest give {values['rtn']:.2f}",
        f"it takes {sizes['original'] / sizes['w4a8']:.1f} times less space on disk",
    ]
    if found.served:
        ratio = found.served.speeds["w4a8"] / found.served.speeds["original"]
        parts.append(f"it decodes at {ratio:.2f} times the original's speed")
    if capacity := _capacity(found):
        parts.append(f"and a cache of the same size holds {capacity:.1f} times as many tokens")
    return ", ".join(parts) + "."


def _table(found: Found, sizes: dict[str, int]) -> Table:
    rows: list[tuple[str, ...]] = [
        ("perplexity", *(f"{found.perplexity[name]:.3f}" for name in NAMES)),
        ("file", *(count_bytes(sizes[name]) for name in NAMES)),
    ]
    if found.served:
        facts, speeds = found.served.facts, found.served.speeds

        def row(title: str, values: dict[str, str]) -> None:
            rows.append((title, *(values.get(name, "–") for name in NAMES)))

        row("weights in memory", {name: count_bytes(facts[name]["weight_bytes"]) for name in SERVED})
        row("decoding, tokens/s", {name: f"{speeds[name]:.1f}" for name in SERVED})
        if _capacity(found):
            row("tokens in the cache", {name: f"{facts[name]['cached_tokens']:,}" for name in SERVED})
    return Table(("", *NAMES.values()), tuple(rows))


def _figures(found: Found) -> tuple[Figure, ...]:
    def paint(figure: Any) -> None:
        values = {NAMES[name]: value for name, value in found.perplexity.items()}
        plots.bars(figure.subplots(), values, [COLORS[name] for name in found.perplexity], "", "{:.2f}")

    words = ", ".join(f"{NAMES[name]} {value:.2f}" for name, value in found.perplexity.items())
    return (Figure("Perplexity, lower is better", plots.draw(paint, 9.6, 2.3), f"Perplexity: {words}."),)


def _notes(context: Context, host: serving.Host, found: Found) -> tuple[str, ...]:
    notes = [
        f"Perplexity is measured over {found.tokens} tokens of {context.measured.name}, in windows of "
        f"{context.effort.length}, with float32 between the layers; in W4A8KV4 keys and values go through 4 bits in "
        "every attention.",
        f"Calibrated on {found.record['calibration']['samples']} samples of {context.calibration.name}; more make it "
        "better (docs/quantization/qoq.md).",
    ]
    if host.reason:
        notes.append(f"Served by {host.name}: {host.reason}.")
    if found.served:
        notes.append(
            f"{found.served.facts['w4a8']['grafted_layers']} layers of the quantized model ran on kernelgraft in "
            f"{host.name}; the three were timed in turns, one short request each, where a 4-bit cache gains nothing."
        )
    return tuple(notes)


def _commands(context: Context, models: dict[str, Path], found: Found) -> tuple[str, ...]:
    calibration = found.record["calibration"]
    quantizing = ["kernelgraft", "quantize", str(models["original"]), "--recipe", f"qoq-g{GROUP_SIZE}", "--out", "qoq"]
    quantizing += ["--calib", str(context.calibration.path), "--samples", str(calibration["samples"])]
    return (shlex.join(quantizing), f"vllm serve qoq --kv-cache-dtype {FOUR_BITS}")
