"""kernelgraft's own format through from_pretrained: 3 and 4 bits, with and without zero points, and damaged files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import kernelgraft
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_transformers.native import KernelgraftAwqConfig, NativeQuantizer

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(3, 27).unsqueeze(0)
LAYOUTS = [Native(bits, group, symmetric) for bits in (3, 4) for group in (32, -1) for symmetric in (False, True)]


def load(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def native(pack, float_llama):
    """A checkpoint of 3 bits."""
    return pack(float_llama, Native(3, 32))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.bits}-{x.group_size}-{x.symmetric}")
def test_logits_are_those_of_the_stored_numbers_and_saving_changes_no_bit(plugin, pack, float_llama, layout, tmp_path):
    packed, exact = pack(float_llama, layout)
    model = load(packed, torch.float16)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == 14
    assert all(layer.prepared and layer.layout.bits == layout.bits for layer in layers)
    wanted = load(exact)
    assert_close("float16", logits(wanted), logits(model).float(), 6e-3)
    assert_close("float32", logits(wanted), logits(load(packed)), 2e-3)

    model.save_pretrained(tmp_path)
    original, saved = (load_file(path / "model.safetensors") for path in (packed, tmp_path))
    assert saved.keys() == original.keys()
    assert any(name.endswith(".zeros") for name in saved) is not layout.symmetric
    for name, tensor in original.items():
        assert saved[name].dtype is tensor.dtype
        assert torch.equal(saved[name], tensor), name
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == layout.config(None)
    assert torch.equal(logits(load(tmp_path, torch.float16)), logits(model))


def test_unloading_restores_both_tables():
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    with kernelgraft.load_plugin("awq", host="transformers"):
        assert [table["kernelgraft_awq"] for table in tables] == [NativeQuantizer, KernelgraftAwqConfig]
    assert [dict(table) for table in tables] == before


BAD_CONFIGS = [
    ({"format_version": 2}, "format_version = 2, expected 1"),
    ({"format_version": None}, "format_version = None, expected 1"),
    ({"bits": 5}, "bits = 5"),
    ({"bits": 4}, "qhigh is no part|is missing|goes with"),
    ({"group_size": 0}, "group_size = 0"),
    ({"group_size": 64}, r"scales is float16 \(\d+, \d\), but .* group size 64"),
    ({"symmetric": "yes"}, "symmetric = 'yes'"),
    ({"symmetric": True}, "zeros is no part"),
    ({"modules_to_not_convert": "mlp"}, "modules_to_not_convert = 'mlp'"),
    ({"speed": 11}, "quantization_config has speed, unknown"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[str(change) for change, _ in BAD_CONFIGS])
def test_a_config_that_does_not_fit_is_refused(plugin, native, edited, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(edited(native[0], lambda config: config.update(change)))


def drop(*parts):
    return lambda tensors: [tensors.pop(f"{UP}.{part}") for part in parts]


def edit(part, change):
    def apply(tensors):
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()

    return apply


BAD_TENSORS = [
    *((drop(part), rf"{UP}: .*{part}") for part in ("qweight", "qhigh", "scales", "zeros")),
    (drop("qweight", "qhigh", "scales", "zeros"), rf"{UP}: the checkpoint has no qweight, qhigh, scales, zeros"),
    (edit("qhigh", lambda t: t[:-1]), rf"{UP}: qhigh is int32 \(127, 2\)"),
    (edit("qweight", torch.Tensor.float), rf"{UP}: qweight is float32"),
    (edit("zeros", torch.Tensor.int), rf"{UP}: zeros is int32"),
    (edit("zeros", lambda t: t + 8), rf"{UP}: zeros go up to \d+, expected 0..7"),
    (edit("scales", lambda t: t * torch.nan), rf"{UP}: scales in the checkpoint are not all finite"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_tensors_that_are_not_one_layer_are_refused_by_name(plugin, native, edited, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(edited(native[0], tensors=change))


def test_a_truncated_file_is_refused_by_name(plugin, native, edited):
    file = edited(native[0]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"holds a file that is not whole: model\.safetensors"):
        load(file.parent)


def test_modules_that_are_not_converted_stay_what_they_are(plugin, pack, float_llama):
    packed, exact = pack(float_llama, Native(3, 32, symmetric=True), ["layers.0.mlp"])
    model = load(packed)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(model.get_submodule(UP), PackedLinear)
    assert_close("logits", logits(load(exact)), logits(model), 2e-3)
