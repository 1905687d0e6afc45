"""The HTML page of ``kernelgraft quantize --report``: self-contained, with every layer and a figure of curves."""

from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from kernelgraft.quantization_report import render, write_report


def record_of(blocks=3, searches=True):
    layers = [
        {"name": f"model.layers.{b}.mlp.{kind}", "error_before": 0.02, "error_after": 0.001 * (b + 1),
         "form": "activation", "exponent": 0.35}
        for b in range(blocks) for kind in ("up_proj", "down_proj")
    ]  # fmt: skip
    curve = [(form, r / 10, 0.5 + r / 10) for form in ("activation", "activation/weight") for r in range(10)]
    found = [
        {"source": "n", "targets": [f"model.layers.{b}.mlp.up_proj"], "inspect": "mlp", "plain_error": 1.0,
         "error": 0.5, "curve": curve}
        for b in range(blocks)
    ]  # fmt: skip
    return {
        "recipe": "awq", "source": "some/model <of> mine", "bits": 3, "group_size": 64, "symmetric": False,
        "kernelgraft": "0.1.0", "seconds": 12.0, "settings": {"scale_points": 20}, "environment": {"torch": "2.13.0"},
        "calibration": {"samples": 4, "length": 16, "text": "t.txt"}, "layers": layers,
        "searches": found if searches else [],
    }  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.rows, self.scripts = [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.rows += tag == "tr"
        self.scripts += tag == "script"
        self.sources += [found["src"]] if "src" in found else []


def test_the_page_needs_nothing_but_itself_and_lists_the_worst_layer_first():
    text = render(record_of())
    page = Page(text)
    assert page.scripts == 0
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert text.index("model.layers.2.mlp.up_proj") < text.index("model.layers.0.mlp.up_proj")
    assert "some/model &lt;of&gt; mine" in text


def test_a_recipe_without_searches_has_no_curves():
    assert len(Page(render(record_of(searches=False))).sources) == 1


def test_a_record_without_layers_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="names no layers"):
        write_report(record_of(blocks=0), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
