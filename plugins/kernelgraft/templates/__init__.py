"""HTML pages that need nothing but themselves: styles and figures are inside, there are no scripts."""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import Any


def render(name: str, **values: Any) -> str:
    """The page ``NAME.html.j2``. The filter ``source`` turns an SVG document into the address of an image."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda file: files(__package__).joinpath(file).read_text(encoding="utf-8")),
    )
    environment.filters["source"] = _image_source
    page: str = environment.get_template(f"{name}.html.j2").render(**values)
    return page


def _image_source(svg: str) -> str:
    # As images and not as markup: two inline drawings would share the names inside them.
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
