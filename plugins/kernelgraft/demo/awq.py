"""AWQ on a real model: quantize, compare with plain rounding, serve beside the unquantized model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelgraft.cli.console import count_bytes

from . import plots, serving
from .models import load, materialize, measure_perplexity, quantize
from .sections import Context, Figure, Section, SectionResult, Table

ROUNDING_SAMPLES = 2  # plain rounding learns nothing from them; they only tell its error
SERVED = ("original", "awq")
NAMES = {"original": "original", "rtn": "rounded to nearest", "awq": "AWQ"}
COLORS = {"original": plots.GRAY, "rtn": plots.ORANGE, "awq": plots.BLUE}


@dataclass(frozen=True)
class Quality:
    """Perplexity by model, and the records of the two checkpoints."""

    perplexity: dict[str, float]
    tokens: int
    records: dict[str, dict[str, Any]]

    @property
    def closed(self) -> float | None:
        """Share of what rounding costs that AWQ wins back; None where rounding costs nothing."""
        original, rounded, awq = (self.perplexity[name] for name in NAMES)
        return (rounded - awq) / (rounded - original) if rounded > original else None


def run(context: Context) -> SectionResult:
    import kernelgraft

    # What can be refused is refused before minutes of work.
    handle = kernelgraft.load_plugin("awq", host="transformers")
    vllm = next(host for host in handle.info.hosts if host.module == "vllm")
    host = serving.choose_host(context.engine, vllm)
    original = context.model or materialize(context)
    models = {"original": original, "rtn": context.work / "rtn", "awq": context.work / "awq"}
    quality = _measure_quality(context, models)
    failures: tuple[str, ...] = ()
    served = None
    try:
        candidates = {
            "original": serving.Candidate(NAMES["original"], original),
            "awq": serving.Candidate(NAMES["awq"], models["awq"], "kernelgraft_awq"),
        }
        served = serving.serve(context, host, candidates, "serve")
    except serving.ServingError as error:
        failures = (str(error),)
    return _summarize(context, models, host, quality, served, failures)


SECTION = Section("awq", "AWQ: a language model in 4 bits", run)


def _measure_quality(context: Context, models: dict[str, Path]) -> Quality:
    from kernelgraft_transformers.quantize import load_source
    from kernelgraft_transformers.texts import encode

    effort = context.effort
    source = load_source(str(models["original"]))
    tokens = encode(source.tokenizer, context.measured.content)
    found = {}

    def measure(name: str) -> None:
        found[name] = measure_perplexity(context, load(context, models[name]), tokens, NAMES[name])

    measure("original")
    records = {}
    for name, samples in (("awq", effort.samples), ("rtn", min(effort.samples, ROUNDING_SAMPLES))):
        records[name] = quantize(context, source, models[name], name, samples, NAMES[name])
    for name in ("rtn", "awq"):
        measure(name)
    windows = min(effort.windows, len(tokens) // effort.length)
    return Quality(found, windows * effort.length, records)


def _summarize(
    context: Context,
    models: dict[str, Path],
    host: serving.Host,
    quality: Quality,
    served: serving.Served | None,
    failures: tuple[str, ...],
) -> SectionResult:
    from kernelgraft_transformers.checkpoint import describe

    sizes = {name: describe(path)["bytes"] for name, path in models.items()}
    record = quality.records["awq"]
    return SectionResult(
        verdict=_verdict(quality, served, sizes),
        table=_table(quality, served, sizes),
        figures=_figures(quality, served, sizes),
        dialogues=served.dialogues if served else (),
        notes=_notes(context, host, quality, served),
        commands=_commands(context, models, record),
        failures=failures,
        data={
            "perplexity": quality.perplexity,
            "perplexity_tokens": quality.tokens,
            "gap_closed": quality.closed,
            "file_bytes": sizes,
            "host": host.name,
            "tokens_per_second": served.speeds if served else None,
            "serving": served.facts if served else None,
            "dialogues": [{"question": d.question, "answers": d.answers} for d in served.dialogues] if served else [],
            "record": record,
        },
    )


def _verdict(quality: Quality, served: serving.Served | None, sizes: dict[str, int]) -> str:
    found = quality.perplexity
    parts = [
        f"In 4 bits the model takes {sizes['original'] / sizes['awq']:.1f} times less space on disk",
        f"its perplexity goes from {found['original']:.2f} to {found['awq']:.2f} "
        f"({found['rtn']:.2f} when weights are rounded to nearest)",
    ]
    if served:
        ratio = served.speeds["awq"] / served.speeds["original"]
        parts.append(f"and it decodes at {ratio:.2f} times the original's speed")
    return ", ".join(parts) + "."


def _table(quality: Quality, served: serving.Served | None, sizes: dict[str, int]) -> Table:
    rows: list[tuple[str, ...]] = [
        ("perplexity", *(f"{quality.perplexity[name]:.3f}" for name in NAMES)),
        ("gap closed", "–", "0%", "–" if quality.closed is None else f"{quality.closed:.0%}"),
        ("file", *(count_bytes(sizes[name]) for name in NAMES)),
        ("time to quantize", "–", *(f"{quality.records[name]['seconds']:.0f} s" for name in ("rtn", "awq"))),
    ]
    if served:
        facts = served.facts

        def row(title: str, values: dict[str, str]) -> None:
            rows.append((title, *(values.get(name, "–") for name in NAMES)))

        row("weights in memory", {name: count_bytes(facts[name]["weight_bytes"]) for name in SERVED})
        row("most memory of the process", {name: count_bytes(facts[name]["peak_bytes"]) for name in SERVED})
        if all(facts[name]["peak_gpu_bytes"] for name in SERVED):
            row("most memory of the GPU", {name: count_bytes(facts[name]["peak_gpu_bytes"]) for name in SERVED})
        row("decoding, tokens/s", {name: f"{served.speeds[name]:.1f}" for name in SERVED})
    return Table(("", *NAMES.values()), tuple(rows))


def _figures(quality: Quality, served: serving.Served | None, sizes: dict[str, int]) -> tuple[Figure, ...]:
    record = quality.records["awq"]

    def named(values: dict[str, float]) -> dict[str, float]:
        return {NAMES[name]: value for name, value in values.items()}

    def paint_perplexity(figure: Any) -> None:
        title = "" if quality.closed is None else f"AWQ closes {quality.closed:.0%} of the gap"
        axes = figure.subplots()
        plots.bars(axes, named(quality.perplexity), list(COLORS.values()), title, "{:.2f}")

    def paint_cost(figure: Any) -> None:
        panels: list[tuple[str, dict[str, float], str]] = [
            ("file, MiB", {name: sizes[name] / 2**20 for name in SERVED}, "{:.0f}")
        ]
        if served:
            panels.insert(0, ("decoding, tokens/s", served.speeds, "{:.1f}"))
            for title, key in (
                ("weights in memory, MiB", "weight_bytes"),
                ("most memory of process, MiB", "peak_bytes"),
            ):
                panels.append((title, {name: served.facts[name][key] / 2**20 for name in SERVED}, "{:.0f}"))
        axes = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False).flatten()
        for panel, (title, values, text) in zip(axes, panels, strict=True):
            plots.bars(panel, named(values), [COLORS[name] for name in SERVED], title, text)

    words = ", ".join(f"{NAMES[name]} {value:.2f}" for name, value in quality.perplexity.items())
    layers = record["layers"]
    better = sum(layer["error_after"] < layer["error_before"] for layer in layers)
    labels = (NAMES["rtn"], NAMES["awq"])
    figures = [
        Figure("Perplexity, lower is better", plots.draw(paint_perplexity, 9.6, 1.9), f"Perplexity: {words}."),
        Figure(
            "Speed and size" if served else "Size",
            plots.draw(paint_cost, 9.6, 3.0 if served else 1.5),
            "Bars of the original beside AWQ; the table above has the numbers.",
        ),
        Figure(
            f"Error of every layer: smaller in {better} of {len(layers)}",
            plots.draw(lambda figure: plots.layer_errors(figure, layers, labels), 9.6, 4.6),
            "Relative squared error of each linear layer's output over the blocks, rounded to nearest and with AWQ.",
        ),
    ]
    if any(layer["form"] != "identity" for layer in layers):
        points = record["settings"]["scale_points"]
        figures.append(
            Figure(
                "Which scales the search chose",
                plots.draw(lambda figure: plots.exponents(figure.subplots(), layers, points), 9.6, 2.6),
                "Histogram of the scale exponents over the layers, by the form of the scale.",
            )
        )
    return tuple(figures)


def _notes(context: Context, host: serving.Host, quality: Quality, served: serving.Served | None) -> tuple[str, ...]:
    record = quality.records["awq"]
    notes = [
        f"Perplexity is measured in float32 over {quality.tokens} tokens of {context.measured.name}, in windows of "
        f"{context.effort.length}; both 4-bit models run on kernelgraft's kernels in Transformers.",
        f"Calibrated on {record['calibration']['samples']} samples of {record['calibration']['length']} tokens of "
        f"{context.calibration.name}, group size {record['group_size']}.",
    ]
    if context.model is None:
        notes.append(
            "SmolLM2 comes from a GGUF file whose weights lie on a 4-bit grid of 32 columns already: what quantizing "
            "it again costs is not what it costs a model that was never rounded."
        )
    if host.reason:
        notes.append(f"Served by {host.name}: {host.reason}.")
    if served:
        grafted = served.facts["awq"]["grafted_layers"]
        notes.append(
            f"Both models were served by {host.name} at the same time, each in a process of its own, and timed in "
            f"turns: one request, greedy, {context.effort.new_tokens} tokens, median of {context.effort.rounds}. "
            f"{grafted} layers of the 4-bit model ran on kernelgraft."
        )
        if host.engine == "vllm" and context.device == "cpu":
            notes.append(
                "The memory of a process holds vLLM itself and its key-value cache, 1 GiB unless set otherwise."
            )
    return tuple(notes)


def _commands(context: Context, models: dict[str, Path], record: dict[str, Any]) -> tuple[str, ...]:
    calibration, effort = record["calibration"], context.effort
    quantize = [
        "kernelgraft",
        "quantize",
        str(models["original"]),
        "--out",
        "awq",
        "--calib",
        str(context.calibration.path),
    ]
    quantize += ["--samples", str(calibration["samples"]), "--seqlen", str(calibration["length"])]
    measure = ["kernelgraft", "ppl", "awq", "--text", str(context.measured.path)]
    measure += ["--windows", str(effort.windows), "--seqlen", str(effort.length)]
    return (shlex.join(quantize), shlex.join(measure), "vllm serve awq --quantization kernelgraft_awq")
