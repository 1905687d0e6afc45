"""QoQ checkpoints through from_pretrained: the layers compute what was quantized, in integers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from kernelgraft.patches import PatchSet
from kernelgraft_core.quant.w4a8 import cpu_panels, quantize_activation
from kernelgraft_core.quant.w4a8.linear import W4A8Linear
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_transformers.qoq import graft
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

IDS = torch.arange(3, 27).unsqueeze(0)


@pytest.fixture(scope="module", params=["qoq-g64", "qoq-chn"])
def checkpoint(request, float_llama, words, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    source = load_source(str(float_llama))
    quantize_checkpoint(source, out, words, recipe=request.param, calibration=Calibration(samples=4, length=48))
    return out


@pytest.fixture
def grafted():
    patches = PatchSet("qoq")
    graft(patches)
    yield
    patches.undo()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_every_layer_multiplies_its_weight_with_activations_of_8_bits(grafted, checkpoint):
    """Layer by layer: a difference in the last place may round one activation the other way in the next layer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layers, seen = [layer for layer in model.modules() if isinstance(layer, W4A8Linear)], {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, out: seen.update({layer: (args[0], out)}))
    logits(model)
    assert len(seen) == len(layers)
    for layer, (x, out) in seen.items():
        q, scale, _ = quantize_activation(x)
        exact = (
            (q.double() @ layer.weight.int8().double().T) * scale.double().unsqueeze(-1) * layer.weight.scale.double()
        )
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_logits_are_near_those_of_the_weights_in_floating_point(grafted, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = logits(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, W4A8Linear)]:
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data = layer.weight.values(torch.float32)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)
    assert_close("logits", logits(model), found, 3e-2)
    assert not torch.equal(logits(model), found)


def test_every_linear_layer_of_the_blocks_is_ours_and_the_head_is_not(grafted, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ours = [name for name, layer in model.named_modules() if isinstance(layer, W4A8Linear)]
    assert len(ours) == 7 * len(model.model.layers)
    assert all(model.get_submodule(name).prepared for name in ours)
    assert type(model.lm_head) is torch.nn.Linear
    assert logits(model).isfinite().all()


def test_generation_runs(grafted, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=1))


def test_what_was_loaded_is_saved_bit_for_bit(grafted, checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(tmp_path)
    before, after = (load_file(directory / "model.safetensors") for directory in (checkpoint, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.skipif(cpu_panels.byte_set() is None, reason="no kernels of ours for this processor")
def test_a_layer_keeps_four_bits_or_adds_eight(checkpoint):
    found = {}
    for cpu_weight in ("int4", "int8"):
        patches = PatchSet("qoq")
        graft(patches, cpu_weight)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        layers = [layer for layer in model.modules() if isinstance(layer, W4A8Linear)]
        assert {layer.weight.is_arranged for layer in layers} == {cpu_weight == "int4"}
        found[cpu_weight] = logits(model)
        patches.undo()
    assert torch.equal(found["int4"], found["int8"])
    assert W4A8Linear.cpu_weight == "int4"
    with pytest.raises(ValueError, match="cpu_weight is 'int2', expected one of"):
        graft(PatchSet("qoq"), "int2")


@pytest.mark.skipif(cpu_panels.byte_set() is None, reason="no kernels of ours for this processor")
def test_a_layer_that_is_moved_is_arranged_anew(grafted, checkpoint, monkeypatch):
    layer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).model.layers[0].mlp.down_proj
    before = layer.weight
    monkeypatch.setattr(layer, "_held_for", "cuda")  # as if it came from there
    layer.words, layer.row_scale = before.plain().qweight, before.scale
    for name, tensor in zip(("group_scales", "group_zeros"), before.plain().tensors[2:4], strict=True):
        if tensor is not None:
            setattr(layer, name, tensor)
    assert layer.weight.is_arranged
    assert torch.equal(layer.weight.int8(), before.int8())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_bits": 4}, "act_bits = 4, expected 8"),
        ({"groups": 3}, "groups, unknown to qoq"),
        ({"bits": 8}, "bits = 8"),
        ({"modules_to_not_convert": "mlp"}, "modules_to_not_convert = 'mlp', expected a list of names"),
        ({"modules_to_not_convert": ["mlp"]}, r"mlp\.down_proj is stored quantized, but modules_to_not_convert"),
    ],
)
def test_configs_of_another_kind_are_refused(grafted, checkpoint, tmp_path, change, message):
    shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")


def test_undone_it_leaves_the_tables_as_they_were():
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    patches = PatchSet("qoq")
    graft(patches)
    assert "qoq" in auto.AUTO_QUANTIZER_MAPPING
    patches.undo()
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
