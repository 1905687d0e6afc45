"""Every transform of QoQ on every architecture: without rounding the logits stay what they are."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from kernelgraft_core.quant.outcome import LayerReport
from kernelgraft_core.quant.qoq import QoqConfig, QoqMethod, method
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.runner import quantize_model
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .architecture_cases import CASES, deviation, norms_in_float64, tiny
from .architecture_cases import logits as logits_of

# What stands in the way of rotation, by the start of the model type; anything else can be rotated.
OBSTACLES = {
    "opt": "LayerNorms",
    "gpt_neox": "LayerNorms",
    "gemma2": "is a norm behind a layer that writes the stream",
    "gemma3": "is a norm behind a layer that writes the stream|pictures enter",
    "llava": "pictures enter",
    "qwen2_vl": "pictures enter",
    "qwen2_5_vl": "pictures enter",
    "qwen3_vl": "pictures enter",
}


def obstacle(name):
    return next((reason for start, reason in OBSTACLES.items() if name.startswith(start)), None)


def logits(model, case):
    with norms_in_float64():
        return logits_of(model, case)


@pytest.fixture(autouse=True)
def unrounded(monkeypatch):
    monkeypatch.setattr(
        method._BlockQuantizer, "_quantize", lambda self, name, _: (None, LayerReport(f"{self._path}.{name}", 0.0, 0.0))
    )


def transform(name, **settings):
    """Deviation of the logits, and the model."""
    model, _ = tiny(CASES[name])
    before = logits(model, CASES[name])
    inputs = [CASES[name].inputs(model)]
    config = QoqConfig(Scheme(4, 8), **settings)
    results = list(quantize_model(model, inputs, QoqMethod(config), scheme_group_size=8))
    assert len(results) == 3
    return deviation(logits(model, CASES[name]), before), model


@pytest.mark.parametrize("name", CASES)
def test_all_transforms_together_leave_the_logits_unchanged(name):
    assert transform(name, rotate=obstacle(name) is None)[0] < 1e-9


@pytest.mark.parametrize("name", [name for name in CASES if obstacle(name) is not None])
def test_what_cannot_be_rotated_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=rf"cannot be rotated: .*({obstacle(name)}).*rotate=False"):
        transform(name)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "qwen2", "gemma"])
@pytest.mark.parametrize("step", ["rotate", "smooth_attention", "smooth_output", "reorder"])
def test_each_step_alone_changes_weights_and_not_logits(name, step):
    off = {"rotate": False, "smooth_attention": 0.0, "smooth_output": (0.0, 0.0), "reorder": False}
    on = {step: QoqConfig.__dataclass_fields__[step].default}
    original, _ = tiny(CASES[name])
    found, model = transform(name, **off | on)
    assert found < 1e-9
    changed = [
        n
        for n, p in model.named_parameters()
        if n in original.state_dict() and not torch.equal(p, original.get_parameter(n))
    ]
    assert changed


def test_without_any_step_nothing_changes():
    off = {"rotate": False, "smooth_attention": 0.0, "smooth_output": (0.0, 0.0), "reorder": False}
    original, _ = tiny(CASES["llama"])
    _, model = transform("llama", **off)
    assert all(torch.equal(p, original.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_a_tied_head_is_untied_by_rotation(name):
    model, _ = tiny(CASES[name])
    model.lm_head.weight = model.model.embed_tokens.weight
    before = logits(model, CASES[name])
    config = QoqConfig(Scheme(4, 8), reorder=False)
    list(quantize_model(model, [CASES[name].inputs(model)], QoqMethod(config), scheme_group_size=8))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert deviation(logits(model, CASES[name]), before) < 1e-9
