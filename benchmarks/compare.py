"""Compare two result files of one machine: ``python -m benchmarks.compare old.json new.json --threshold 1.10``.

Exit status: 0 nothing is slower than the threshold, 1 something is or went missing, 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .run import SCHEMA

# What must be the same for times to mean anything side by side.
MACHINE = ("cpu", "cores", "threads", "gpu", "sm")


class IncomparableError(ValueError):
    """Files of different machines, or no result files at all."""


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        IncomparableError: it is missing, or not of our schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IncomparableError(f"{path}: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise IncomparableError(f"{path} is not a result file of schema {SCHEMA}")
    return document


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> tuple[list[str], list[str]]:
    """Lines for all results that both files have, and for those that got slower than ``threshold`` or went missing.

    Raises:
        IncomparableError: the files are from different machines or numbers of threads.
    """
    for fact in MACHINE:
        was, now = old["env"].get(fact), new["env"].get(fact)
        if was != now:
            raise IncomparableError(f"{fact} is {was!r} in one and {now!r} in the other")
    before = {_key(result): result for result in old["results"]}
    after = {_key(result): result for result in new["results"]}
    lines, slower = [], []
    for key, result in before.items():
        if key not in after:
            slower.append(f"{_name(result)}: missing")
            continue
        was, now = result["us"]["p50"], after[key]["us"]["p50"]
        line = f"{_name(result)}: {was:.2f} -> {now:.2f} µs ({now / was:.2f}x)"
        lines.append(line)
        if now > was * threshold:
            slower.append(line)
    return lines, slower


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.compare", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=1.10, help="a longer time than this times the old one fails")
    options = parser.parse_args(arguments)
    try:
        lines, slower = compare(load(options.old), load(options.new), options.threshold)
    except IncomparableError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    if slower:
        print(f"\nslower than {options.threshold:.2f}x, or missing:\n" + "\n".join(slower), file=sys.stderr)
    return 1 if slower else 0


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return (result["case"], result["variant"], result["dtype"], result["device"], *sorted(result["shape"].items()))


def _name(result: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in result["shape"].items())
    return f"{result['case']} {sizes} {result['variant']} {result['dtype']}"


if __name__ == "__main__":
    sys.exit(main())
