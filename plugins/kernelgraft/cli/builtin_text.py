"""The text that commands take when they are given none: one half calibrates, the other is measured."""

from __future__ import annotations

BUILT_IN_TEXT = "Python's pydoc_data.topics"


def built_in_text() -> str:
    """About 700 kB of English prose about Python that comes with every CPython."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def built_in_halves() -> tuple[str, str]:
    """The text to calibrate with and the text to measure on; they share no paragraph."""
    return _halves(built_in_text())


def _halves(text: str) -> tuple[str, str]:
    """Two halves that share no paragraph: the documentation says many things twice, with another indentation."""
    once: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        once.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs = list(once.values())
    half, cut = sum(map(len, paragraphs)) / 2, 0
    while half > 0:
        half -= len(paragraphs[cut])
        cut += 1
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])
