"""QServe's directories to our format and back: state dicts, configs that say nothing, and heads that are not tied."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kernelgraft.patches import PatchSet
from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.formats.qserve import QServe
from kernelgraft_core.quant.formats.registry import find_layout
from kernelgraft_core.quant.w4a8 import W4A8Weight
from kernelgraft_core.quant.weights import pack_weight
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_transformers import shards
from kernelgraft_transformers.convert import convert_checkpoint
from kernelgraft_transformers.qoq import graft
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

IDS = torch.arange(3, 27).unsqueeze(0)


def random_weight(group, n=32, k=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, scale = torch.randint(0, 16, (n, k), generator=generator), torch.rand(n, generator=generator) + 0.01
    if group == -1:
        return W4A8Weight.from_integers(q, scale, zero=torch.randint(0, 16, (n,), generator=generator))
    step = torch.randint(1, 16, (n, k // group), generator=generator)
    return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=8 * step)


def qserve_directory(directory, layout, weights, others=None, **config):
    """As QServe's converter writes it: one state dict, the float model's config."""
    directory.mkdir()
    state = {f"{name}.{part}": t for name, weight in weights.items() for part, t in layout.write(weight).items()}
    torch.save(state | (others or {}), directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return directory


def qoq_directory(directory, layout, weights, others=None, **config):
    directory.mkdir()
    tensors = {f"{name}.{part}": t for name, weight in weights.items() for part, t in layout.write(weight).items()}
    save_file(tensors | (others or {}), directory / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": layout.config(None)} | config
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tensors_of(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(directory.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def settings_of(directory):
    return json.loads((directory / "config.json").read_text())


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def quantized(float_llama, words, tmp_path_factory):
    """The tiny model by the per-channel recipe: rotated, in our format."""
    out = tmp_path_factory.mktemp("qoq") / "out"
    quantize_checkpoint(
        load_source(str(float_llama)), out, words, recipe="qoq-chn", calibration=Calibration(samples=4, length=48)
    )
    return out


def test_a_model_goes_to_qserve_and_back(quantized, tmp_path):
    there = convert_checkpoint(quantized, tmp_path / "qserve", "qserve")
    assert (there.source, there.target, there.layers, there.rounded) == ("qoq", "QServe", 14, [])
    assert "quantization_config" not in settings_of(tmp_path / "qserve")
    assert [file.name for file in (tmp_path / "qserve").glob("*model*")] == ["pytorch_model.bin"]
    layer = "model.layers.0.self_attn.q_proj"
    state = tensors_of(tmp_path / "qserve")
    assert sorted(name for name in state if layer in name) == [
        f"{layer}.{part}" for part in ("qweight", "s1_scales", "s1_szeros")
    ]
    back = convert_checkpoint(tmp_path / "qserve", tmp_path / "back", "qoq")
    assert (back.source, back.target) == ("QServe", "qoq")
    same(tensors_of(tmp_path / "back"), tensors_of(quantized))
    written = settings_of(tmp_path / "back").pop("quantization_config")
    assert find_layout(written) == Qoq(4, -1, zero_form="post")
    assert "lm_head" in written["modules_to_not_convert"]
    for file in ("tokenizer.json", "kernelgraft.json"):
        assert (tmp_path / "back" / file).read_bytes() == (quantized / file).read_bytes()


def test_transformers_computes_the_same_with_what_came_from_qserve(quantized, tmp_path):
    convert_checkpoint(quantized, tmp_path / "qserve", "qserve")
    convert_checkpoint(tmp_path / "qserve", tmp_path / "back", "qoq")
    patches, logits = PatchSet("qoq"), []
    graft(patches)
    for directory in (quantized, tmp_path / "back"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits.append(model(IDS).logits.detach())
    patches.undo()
    assert torch.equal(*logits)


@pytest.mark.parametrize("group", [128, -1])
@pytest.mark.parametrize("said", [False, True], ids=["found", "said"])
def test_the_files_of_its_converter_are_read(tmp_path, group, said):
    weights = {f"model.layers.{i}.mlp.up_proj": random_weight(group, seed=i) for i in range(2)}
    others = {"model.layers.0.mlp.up_proj.bias": torch.randn(32).half(), "model.norm.weight": torch.ones(8).half()}
    source = qserve_directory(tmp_path / "in", QServe(group_size=group), weights, others)
    options = {"source_format": "qserve", "group_size": group} if said else {}
    convert_checkpoint(source, tmp_path / "out", "qoq", **options)
    layout, found = Qoq(4, group, zero_form="post"), tensors_of(tmp_path / "out")
    assert find_layout(settings_of(tmp_path / "out")["quantization_config"]) == layout
    for name, weight in weights.items():
        read = layout.read({part: found.pop(f"{name}.{part}") for part in layout.parts(32, 256)})
        assert all(a is b or torch.equal(a, b) for a, b in zip(read.tensors, weight.tensors, strict=True))
    same(found, others)


def test_a_file_alone_is_read(tmp_path):
    """DeepCompressor calls it quant_model.pt."""
    source = qserve_directory(tmp_path / "in", QServe(), {"fc": random_weight(128)})
    (source / "pytorch_model.bin").rename(tmp_path / "quant_model.pt")
    done = convert_checkpoint(tmp_path / "quant_model.pt", tmp_path / "out", "qoq", config=source)
    assert (done.source, done.layers) == ("QServe", 1)


def test_the_order_of_deepcompressor_is_read_where_it_is_said_and_put_right(tmp_path):
    weights = {"fc": random_weight(128)}
    orders = ("qserve", "deepcompressor")
    sources = {o: qserve_directory(tmp_path / o, QServe(s2_order=o), weights) for o in orders}
    for target in ("qoq", "qserve"):
        for order, source in sources.items():
            convert_checkpoint(source, tmp_path / f"{order}-{target}", target, source_format="qserve", s2_order=order)
        same(*(tensors_of(tmp_path / f"{order}-{target}") for order in orders))
    same(tensors_of(tmp_path / "qserve-qserve"), tensors_of(sources["qserve"]))


@pytest.mark.parametrize("target", ["qoq", "qserve"])
def test_our_own_format_keeps_its_settings(tmp_path, target):
    layout = Qoq(4, 128, zero_form="pre", kv_bits=4, kv_smooth=True)
    source = qoq_directory(tmp_path / "in", layout, {"fc": random_weight(128)})
    convert_checkpoint(source, tmp_path / "out", target)
    if target == "qoq":
        same(tensors_of(tmp_path / "out"), tensors_of(source))
        assert settings_of(tmp_path / "out") == settings_of(source)
    else:
        assert settings_of(tmp_path / "out") == {"model_type": "llama"}


def test_large_models_are_written_and_read_in_shards(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    convert_checkpoint(quantized, tmp_path / "qserve", "qserve")
    files = sorted(tmp_path.glob("qserve/pytorch_model-*-of-*.bin"))
    assert len(files) > 3
    index = json.loads((tmp_path / "qserve" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_of(tmp_path / "qserve").keys()
    assert set(index.values()) == {file.name for file in files}
    convert_checkpoint(tmp_path / "qserve", tmp_path / "back", "qoq")
    same(tensors_of(tmp_path / "back"), tensors_of(quantized))


def test_only_a_tensors_own_memory_is_written(quantized, tmp_path):
    done = convert_checkpoint(quantized, tmp_path / "qserve", "qserve")
    assert (tmp_path / "qserve" / "pytorch_model.bin").stat().st_size < done.bytes + 500 * len(
        tensors_of(tmp_path / "qserve")
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_the_config_calls_tied_is_kept_where_it_is_another(tmp_path, tied):
    """QServe's directories keep the config of the model that was rotated, which unties the two."""
    embeddings = torch.randn(10, 8).half()
    others = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings if tied else embeddings + 1}
    source = qserve_directory(tmp_path / "in", QServe(), {"fc": random_weight(128)}, others, tie_word_embeddings=True)
    convert_checkpoint(source, tmp_path / "out", "qoq")
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) is not tied
    assert settings_of(tmp_path / "out")["tie_word_embeddings"] is tied


def test_qserve_gets_the_head_that_it_looks_for(tmp_path):
    others = {"model.embed_tokens.weight": torch.randn(10, 8).half(), "model.norm.weight": torch.ones(8)}
    source = qoq_directory(tmp_path / "in", Qoq(), {"fc": random_weight(128)}, others, tie_word_embeddings=True)
    done = convert_checkpoint(source, tmp_path / "out", "qserve")
    written = tensors_of(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], others["model.embed_tokens.weight"])
    assert done.bytes == sum(tensor.nbytes for tensor in written.values())


def refused(message, source, out, target, *, error=CheckpointError, **settings):
    with pytest.raises(error, match=message):
        convert_checkpoint(source, out, target, **settings)
    assert not out.exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_norm.weight", "model.norm.bias"])
def test_norms_that_qserve_would_not_read_are_refused_by_name(tmp_path, name):
    others = {name: torch.tensor([1.0, 1.5])}
    source = qoq_directory(tmp_path / "in", Qoq(), {"fc": random_weight(128)}, others)
    refused(f"{name} is not 1 everywhere, and QServe reads no norms", source, tmp_path / "out", "qserve")


def test_groups_and_steps_that_qserve_has_not_are_refused(tmp_path):
    small = qoq_directory(tmp_path / "small", Qoq(4, 64), {"fc": random_weight(64)})
    refused("small cannot be written as QServe: group_size = 64", small, tmp_path / "out", "qserve")
    steep = W4A8Weight.from_integers(
        torch.ones(32, 128), torch.ones(32), group_scale=torch.full((32, 1), 128), group_zero=torch.full((32, 1), 128)
    )
    source = qoq_directory(tmp_path / "steep", Qoq(), {"fc": steep})
    refused("fc: group_scale goes up to 128", source, tmp_path / "out", "qserve")
    odd = qoq_directory(tmp_path / "odd", Qoq(), {"fc": random_weight(128, n=48)})
    refused("odd: fc cannot be written: N = 48 and K = 256", odd, tmp_path / "out", "qserve")


def test_weights_for_other_activations_are_refused(tmp_path):
    source = qserve_directory(tmp_path / "in", QServe(), {"fc": random_weight(128)})
    refused("in holds weights for activations of 8 bits, AutoAWQ GEMM for those of 16", source, tmp_path / "out", "awq")
    awq = pack_weight(torch.ones(32, 128), torch.ones(32, 1), torch.ones(32, 1), 4)
    (tmp_path / "awq").mkdir()
    save_file({f"fc.{part}": t for part, t in Gemm().write(awq).items()}, tmp_path / "awq" / "model.safetensors")
    (tmp_path / "awq" / "config.json").write_text(json.dumps({"quantization_config": Gemm().config(None)}))
    for target in ("qoq", "qserve"):
        refused("awq holds weights for activations of 16 bits", tmp_path / "awq", tmp_path / "out", target)


def test_a_group_size_that_is_not_the_files_is_refused(tmp_path):
    source = qserve_directory(tmp_path / "in", QServe(group_size=-1), {"fc": random_weight(-1)})
    refused("fc: s2_scales is missing", source, tmp_path / "out", "qoq", source_format="qserve", group_size=128)


def test_fractional_zero_points_are_refused_by_layer(tmp_path):
    source = qserve_directory(tmp_path / "in", QServe(group_size=-1), {"fc": random_weight(-1)})
    state = tensors_of(source)
    state["fc.s1_szeros"][7] *= 1.03
    state["fc.s1_szeros"][7] += 0.1 * state["fc.s1_scales"][7]
    torch.save(state, source / "pytorch_model.bin")
    refused(r"fc: s1_szeros\[7\] = .* is not the scale", source, tmp_path / "out", "qoq")


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    source = qserve_directory(tmp_path / "in", QServe(), {"fc": random_weight(128)})

    def wrong(message, **settings):
        refused(message, source, tmp_path / "out", "qoq", error=ValueError, **settings)

    wrong("s2_order = 'deepcompressor' is one of source format 'qserve', which is not given", s2_order="deepcompressor")
    wrong("s2_order = 'natural', expected qserve or deepcompressor", source_format="qserve", s2_order="natural")
    wrong("given together or not at all", group_size=128)


def test_a_full_disk_leaves_nothing(quantized, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", full)
    refused(r"pytorch_model\.bin cannot be written: .*unexpected pos 64", quantized, tmp_path / "out", "qserve",
            error=OSError)  # fmt: skip


def test_a_damaged_state_dict_is_refused(quantized, tmp_path):
    convert_checkpoint(quantized, tmp_path / "qserve", "qserve")
    shutil.copytree(tmp_path / "qserve", tmp_path / "damaged")
    state = tensors_of(tmp_path / "damaged")
    del state["model.layers.1.mlp.down_proj.s1_scales"]
    torch.save(state, tmp_path / "damaged" / "pytorch_model.bin")
    refused("down_proj: s1_scales is missing", tmp_path / "damaged", tmp_path / "out", "qoq")
