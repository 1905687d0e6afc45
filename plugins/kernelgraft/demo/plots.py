"""Figures as SVG documents. Nothing is measured here, and matplotlib's global state is left alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GRAY, ORANGE, BLUE = "#8d939c", "#d9822b", "#2563a8"
INK, RULE = "#2b2f36", "#d8dce2"


def draw(paint: Callable[[Any], None], width: float, height: float) -> str:
    """An SVG of ``width`` by ``height`` inches. ``paint`` is given matplotlib's ``Figure``."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = {
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": RULE,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "legend.frameon": False,
        "svg.hashsalt": "kernelgraft",  # the same numbers give the same file
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def bars(axes: Any, values: Mapping[str, float], colors: Sequence[str], title: str, text: str = "{:.1f}") -> None:
    """Horizontal bars from zero, each with its value behind it; ``text`` formats a value."""
    names = list(values)
    drawn = axes.barh(names, list(values.values()), color=list(colors), height=0.62)
    axes.bar_label(drawn, [text.format(value) for value in values.values()], padding=4)
    axes.set_title(title)
    axes.set_xlim(0, max(values.values()) * 1.22)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def layer_errors(figure: Any, layers: Sequence[Mapping[str, Any]], labels: tuple[str, str]) -> None:
    """One panel for each kind of layer: error of its output over the blocks, before and after, on one log scale."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        kind = layer["name"].rpartition(".")[2]
        kinds.setdefault(kind, []).append((layer["error_before"], layer["error_after"]))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (kind, errors) in zip(panels, kinds.items(), strict=False):
        for position, (label, color) in enumerate(zip(labels, (ORANGE, BLUE), strict=True)):
            series = [pair[position] for pair in errors]
            panel.plot(range(len(series)), series, color=color, marker="o", markersize=2.5, linewidth=1.2, label=label)
        panel.set(yscale="log", title=kind)
        panel.grid(True, which="major", axis="y", color=RULE, linewidth=0.7)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel("block", fontsize=9.5)
    figure.supylabel("relative squared error of the output", fontsize=9.5)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2)


def exponents(axes: Any, layers: Sequence[Mapping[str, Any]], points: int) -> None:
    """How many layers got which scale exponent, stacked by the form of the scale."""
    forms = {"activation": BLUE, "activation/weight": "#7fb0dd"}
    edges = [(i - 0.5) / points for i in range(points + 1)]
    chosen = {form: [layer["exponent"] for layer in layers if layer["form"] == form] for form in forms}
    axes.hist(list(chosen.values()), bins=edges, stacked=True, color=list(forms.values()), label=list(forms))
    without = sum(layer["form"] == "identity" for layer in layers)
    axes.set(xlabel="exponent r of the scale", ylabel="layers", title=f"no scale: {without} of {len(layers)} layers")
    axes.grid(True, axis="y", color=RULE, linewidth=0.7)
    axes.legend(title="scale from")


def search_curves(axes: Any, searches: Sequence[Mapping[str, Any]], title: str) -> None:
    """Error over the exponent, relative to no scale, a line for every search and form, a dot at each choice."""
    for form, color in (("activation", BLUE), ("activation/weight", ORANGE)):
        for number, search in enumerate(searches):
            plain = search["plain_error"] or 1.0
            points = [(r, error / plain) for kind, r, error in search["curve"] if kind == form]
            label = form if number == 0 else None
            axes.plot(*zip(*sorted(points), strict=True), color=color, linewidth=0.8, alpha=0.45, label=label)
            best = min(points, key=lambda point: point[1])
            if best[1] * plain == search["error"]:
                axes.plot(*best, color=color, marker="o", markersize=3)
    axes.axhline(1, color=GRAY, linewidth=0.8)
    axes.set_title(title)
    axes.set_ylim(0, 2)
    axes.grid(True, axis="y", color=RULE, linewidth=0.7)
    axes.legend(fontsize=8)
