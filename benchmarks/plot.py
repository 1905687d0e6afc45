"""Draw a result file, measuring nothing: ``python -m benchmarks.plot results.json --out w4a16.svg``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .compare import IncomparableError, load


def plot(document: dict[str, Any], case: str, out: Path) -> None:
    """One line for each variant: time against the first size that varies, with the band from p20 to p80.

    Args:
        out: ``.svg`` or ``.png``.

    Raises:
        ValueError: the file has no such case.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [result for result in document["results"] if result["case"] == case]
    if not results:
        known = sorted({result["case"] for result in document["results"]})
        raise ValueError(f"the file has no case {case!r}; it has {', '.join(known)}")
    sizes = results[0]["shape"]
    axis = next((name for name in sizes if len({r["shape"][name] for r in results}) > 1), next(iter(sizes)))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for variant in dict.fromkeys(result["variant"] for result in results):
        points = sorted((r["shape"][axis], r["us"]) for r in results if r["variant"] == variant)
        x = [size for size, _ in points]
        (line,) = axes.plot(x, [us["p50"] for _, us in points], marker="o", label=variant)
        axes.fill_between(
            x, [us["p20"] for _, us in points], [us["p80"] for _, us in points], alpha=0.2, color=line.get_color()
        )
    env = document["env"]
    fixed = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name != axis)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=axis,
        ylabel="µs",
        title=f"{case}{f' ({fixed})' if fixed else ''}: {env['gpu'] or env['cpu']}, {env['threads']} threads",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(out)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("--case", help="which one, where the file holds several")
    parser.add_argument("--out", type=Path, required=True, help=".svg or .png")
    options = parser.parse_args(arguments)
    try:
        document = load(options.results)
        case = options.case or document["results"][0]["case"]
        plot(document, case, options.out)
    except (IncomparableError, ValueError, ImportError) as error:
        print(f"benchmarks.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
