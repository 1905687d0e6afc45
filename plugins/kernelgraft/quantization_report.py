"""What ``kernelgraft quantize --report`` writes: errors of every layer and the curves of the scale searches."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import templates
from .demo import plots
from .demo.files import write_whole
from .demo.sections import Figure


def check_libraries() -> None:
    """Import what a report needs.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import jinja2
    import matplotlib

    _ = jinja2, matplotlib


def write_report(record: Mapping[str, Any], path: Path) -> None:
    """One HTML page from a record (``kernelgraft.json``), written whole or not at all.

    Raises:
        ValueError: the record names no layers.
    """
    write_whole(path, render(record))


def render(record: Mapping[str, Any]) -> str:
    """The page as a string."""
    layers: Sequence[Mapping[str, Any]] = record["layers"]
    if not layers:
        raise ValueError("the record names no layers: there is nothing to report")
    figures = [_errors(layers)]
    if record.get("searches"):
        figures.append(_curves(record["searches"]))
    return templates.render(
        "quantization",
        record=record,
        figures=figures,
        before=statistics.median(layer["error_before"] for layer in layers),
        after=statistics.median(layer["error_after"] for layer in layers),
        worst=sorted(layers, key=lambda layer: -layer["error_after"]),
        settings=record["settings"] | record["environment"],
    )


def _errors(layers: Sequence[Mapping[str, Any]]) -> Figure:
    kinds = len({layer["name"].rpartition(".")[2] for layer in layers})
    svg = plots.draw(
        lambda figure: plots.layer_errors(figure, layers, ("rounded to nearest", "now")),
        9.4,
        2.1 * -(-kinds // 4) + 0.7,
    )
    return Figure("Error of every layer over the blocks", svg, "output error of each layer, before and after")


def _curves(searches: Sequence[Mapping[str, Any]]) -> Figure:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for search in searches:
        kinds.setdefault(", ".join(_kind(name) for name in _unique(search["targets"])), []).append(search)
    rows = -(-len(kinds) // 2)

    def paint(figure: Any) -> None:
        panels = figure.subplots(rows, 2, squeeze=False).flatten()
        for panel, (kind, found) in zip(panels, kinds.items(), strict=False):
            plots.search_curves(panel, found, kind)
        for panel in panels[len(kinds) :]:
            panel.set_visible(False)
        figure.supxlabel("exponent r of the scale", fontsize=9.5)
        figure.supylabel("error relative to no scale", fontsize=9.5)

    return Figure(
        "Scale searches, a line for every block", plots.draw(paint, 9.4, 2.6 * rows + 0.6), "error over exponent"
    )


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def _unique(layers: Sequence[str]) -> list[str]:
    """One layer of every kind: a mixture has the same kinds in each expert."""
    return list({_kind(name): name for name in layers}.values())
