"""Checkpoints in another format: the same integers in other places, or nothing at all."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kernelgraft_core.quant.formats.autoawq import Gemm, Gemv
from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.formats.llm_awq import LlmAwq
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.formats.registry import TARGETS, find_layout
from kernelgraft_core.quant.weights import pack_weight
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_transformers import convert as convert_module
from kernelgraft_transformers import shards
from kernelgraft_transformers.checkpoint import describe
from kernelgraft_transformers.convert import convert_checkpoint

GROUP = 32
READ = {
    "gemm": Gemm(group_size=GROUP),
    "gemv": Gemv(group_size=GROUP),
    "gemv-fast": LlmAwq(group_size=GROUP),
    "gptqmodel-gemv-fast": LlmAwq(group_size=GROUP, offsets="qzeros"),
    "compressed-tensors": PackQuantized(group_size=GROUP),
    "kernelgraft": Native(group_size=GROUP),
}

AWQ_TARGETS = [target for target, kind in TARGETS.items() if kind.activation_bits == 16]


def tensors_of(directory):
    """All tensors of a model directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def settings_of(directory):
    return json.loads((directory / "config.json").read_text())


def write_model(directory, layout, weights, others=None, *, quantization=None, **config):
    """A model directory with ``weights`` by layer name, and tensors that are not quantized."""
    directory.mkdir()
    tensors = dict(others or {})
    for name, weight in weights.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in layout.write(weight).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = quantization or layout.config(None)
    (directory / "config.json").write_text(json.dumps({"model_type": "other"} | config))
    return directory


def random_weight(bits=4, n=16, k=128, *, symmetric=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    groups, top = k // GROUP, 1 << bits
    zeros = torch.randint(0, top, (n, groups), generator=random)
    scales = torch.rand(n, groups, generator=random) + 0.01
    q = torch.randint(0, top, (n, k), generator=random)
    return pack_weight(q, scales, torch.full_like(zeros, top // 2) if symmetric else zeros, bits)


@pytest.fixture
def rewritten(quantized, tmp_path):
    """``rewritten(layout)``: the quantized model as another program would have written it."""
    stored, gemm = tensors_of(quantized.directory), READ["gemm"]
    layers = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    weights = {
        name: gemm.read({part: stored.pop(f"{name}.{part}") for part in gemm.parts(8, GROUP)}) for name in layers
    }

    def rewrite(layout):
        config = settings_of(quantized.directory)
        del config["quantization_config"]
        directory = write_model(tmp_path / "rewritten", layout, weights, stored, **config)
        shutil.copyfile(quantized.directory / "tokenizer.json", directory / "tokenizer.json")
        return directory

    return rewrite


@pytest.mark.parametrize("target", AWQ_TARGETS)
def test_there_and_back_every_tensor_is_the_same(quantized, tmp_path, target):
    there = convert_checkpoint(quantized.directory, tmp_path / "there", target)
    back = convert_checkpoint(tmp_path / "there", tmp_path / "back", "awq")
    assert (there.source, there.target, there.layers) == ("AutoAWQ GEMM", TARGETS[target].label, 14)
    assert (back.source, back.target, back.layers) == (TARGETS[target].label, "AutoAWQ GEMM", 14)
    assert there.rounded == back.rounded == []
    same(tensors_of(tmp_path / "back"), tensors_of(quantized.directory))
    described = describe(tmp_path / "there")
    assert (described["layout"]["format"], described["quantized_layers"]) == (TARGETS[target].label, 14)
    assert there.bytes == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "there").values())


@pytest.mark.parametrize("name", READ)
def test_every_format_that_is_read_gives_the_same_autoawq_checkpoint(rewritten, quantized, tmp_path, name):
    done = convert_checkpoint(rewritten(READ[name]), tmp_path / "out", "awq")
    assert done.source == READ[name].label
    same(tensors_of(tmp_path / "out"), tensors_of(quantized.directory))


@pytest.mark.parametrize("target", AWQ_TARGETS)
def test_whatever_is_not_a_layer_stays(quantized, tmp_path, target):
    convert_checkpoint(quantized.directory, tmp_path / "out", target)
    for file in quantized.directory.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = settings_of(quantized.directory), settings_of(tmp_path / "out")
    assert find_layout(after.pop("quantization_config")) == TARGETS[target](4, GROUP)
    del before["quantization_config"]
    assert after == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_transformers_loads_all_three_and_computes_the_same(quantized, tmp_path, plugin):
    pytest.importorskip("compressed_tensors")
    convert_checkpoint(quantized.directory, tmp_path / "ct", "compressed-tensors")
    convert_checkpoint(tmp_path / "ct", tmp_path / "awq", "awq")
    convert_checkpoint(tmp_path / "ct", tmp_path / "own", "kernelgraft")
    tokens = torch.arange(2, 34).unsqueeze(0)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "awq", dtype=torch.float32)(tokens).logits
        native = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)(tokens).logits
        plain = quantized.model(tokens).logits
    assert torch.allclose(theirs, plain, rtol=1e-4, atol=1e-4 * plain.abs().max())
    assert torch.allclose(ours, plain, rtol=2e-2, atol=2e-2 * plain.abs().max())
    assert torch.equal(native, ours)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_our_own_format_is_rewritten_as_it_is(tmp_path, bits, symmetric):
    weights = {f"layers.{i}.fc": random_weight(bits, n=9, seed=i, symmetric=symmetric) for i in range(3)}
    source = write_model(tmp_path / "source", Native(bits, GROUP, symmetric), weights)
    convert_checkpoint(source, tmp_path / "out", "kernelgraft")
    same(tensors_of(tmp_path / "out"), tensors_of(source))
    assert settings_of(tmp_path / "out") == settings_of(source)


def test_a_symmetric_checkpoint_stays_symmetric_where_it_can(tmp_path):
    layout = PackQuantized(group_size=GROUP, symmetric=True)
    source = write_model(tmp_path / "ct", layout, {"fc": random_weight(symmetric=True)})
    convert_checkpoint(source, tmp_path / "own", "kernelgraft")
    assert sorted(tensors_of(tmp_path / "own")) == ["fc.qweight", "fc.scales"]
    convert_checkpoint(tmp_path / "own", tmp_path / "ct2", "compressed-tensors")
    same(tensors_of(tmp_path / "ct2"), tensors_of(source))
    convert_checkpoint(source, tmp_path / "awq", "awq")
    written = tensors_of(tmp_path / "awq")["fc.qzeros"]
    assert set(written.flatten().tolist()) == {0x88888888 - 2**32}


@pytest.mark.parametrize("kind", [Gemm, Gemv, LlmAwq], ids=["first", "tinychat", "tinychat-2"])
def test_the_files_of_llm_awq_are_read(rewritten, quantized, tmp_path, kind):
    """They are state dicts without a config; layer norms and embeddings are in them, a tied head twice."""
    directory = rewritten(kind(group_size=GROUP))
    state = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    torch.save(state, tmp_path / "awq_model_w4_g32.pt")
    config = settings_of(directory)
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    done = convert_checkpoint(
        tmp_path / "awq_model_w4_g32.pt", tmp_path / "out", "awq",
        source_format="llm-awq", config=directory, group_size=GROUP,
    )  # fmt: skip
    assert done.source == kind.label
    same(tensors_of(tmp_path / "out"), tensors_of(quantized.directory))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_tied_head_of_a_state_dict_is_left_out(tmp_path):
    layout, weight = LlmAwq(group_size=GROUP), random_weight()
    embeddings = torch.rand(10, 16).half()
    state = {f"fc.{part}": tensor for part, tensor in layout.write(weight).items()}
    state |= {"embed.weight": embeddings, "lm_head.weight": embeddings, "view.weight": embeddings[1:]}
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    convert_checkpoint(
        tmp_path / "model.pt", tmp_path / "out", "compressed-tensors", source_format="llm-awq", group_size=GROUP
    )
    written = tensors_of(tmp_path / "out")
    assert "lm_head.weight" not in written
    assert torch.equal(written["embed.weight"], embeddings)
    assert torch.equal(written["view.weight"], embeddings[1:])
    assert settings_of(tmp_path / "out")["quantization_config"]["ignore"] == ["embed", "lm_head", "view"]


@pytest.mark.parametrize("old", [False, True], ids=["config.json", "quant_config.json"])
def test_pickled_autoawq_directories_are_read(rewritten, quantized, tmp_path, old):
    directory = rewritten(READ["gemm"])
    stored = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    halves = sorted(stored)[::2], sorted(stored)[1::2]
    for number, names in enumerate(halves, 1):
        torch.save({n: stored[n] for n in names}, directory / f"pytorch_model-0000{number}-of-00002.bin")
    index = {n: f"pytorch_model-0000{number}-of-00002.bin" for number, names in enumerate(halves, 1) for n in names}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    if old:
        config = settings_of(directory)
        del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))
        settings = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
        (directory / "quant_config.json").write_text(json.dumps(settings))
    convert_checkpoint(directory, tmp_path / "out", "awq")
    same(tensors_of(tmp_path / "out"), tensors_of(quantized.directory))
    assert not (tmp_path / "out" / "quant_config.json").exists()
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json says that pytorch_model-00002-of-00002\.bin holds"):
        convert_checkpoint(directory, tmp_path / "out2", "awq")


def test_large_models_are_written_in_shards(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    seen = []
    convert_checkpoint(
        quantized.directory, tmp_path / "ct", "compressed-tensors", on_tensor=lambda *step: seen.append(step)
    )
    files = sorted(tmp_path.glob("ct/*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 25_000 for file in files)
    index = json.loads((tmp_path / "ct" / shards.INDEX).read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "ct").keys() == {name for name, _, _ in seen}
    done, totals = [step[1] for step in seen], {step[2] for step in seen}
    assert done == sorted(done)
    assert {done[-1]} == totals == {index["metadata"]["total_size"]}
    convert_checkpoint(tmp_path / "ct", tmp_path / "back", "awq")
    same(tensors_of(tmp_path / "back"), tensors_of(quantized.directory))


SKIPPED = {
    "awq": ["model.embed", "model.layers.1.router", "visual", "lm_head"],
    "compressed-tensors": [
        "lm_head", "model.embed", "model.layers.1.router", "visual.blocks.0.fc", "visual.blocks.1.fc",
    ],
}  # fmt: skip


def test_modules_that_are_not_quantized_are_named_as_the_target_wants_them(tmp_path):
    plain = ["model.embed", "model.layers.1.router", "visual.blocks.0.fc", "visual.blocks.1.fc", "lm_head"]
    others = {f"{name}.weight": torch.zeros(4, 4).half() for name in plain}
    others |= {"model.norm.weight": torch.ones(4).half(), "visual.conv.weight": torch.zeros(2, 2, 2, 2).half()}
    weights = {f"model.layers.{i}.fc": random_weight(seed=i) for i in (0, 1)}
    source = write_model(tmp_path / "awq", READ["gemm"], weights, dict(reversed(others.items())))
    convert_checkpoint(source, tmp_path / "ct", "compressed-tensors")
    convert_checkpoint(tmp_path / "ct", tmp_path / "back", "awq")
    assert settings_of(tmp_path / "ct")["quantization_config"]["ignore"] == SKIPPED["compressed-tensors"]
    assert sorted(settings_of(tmp_path / "back")["quantization_config"]["modules_to_not_convert"]) == sorted(
        SKIPPED["awq"]
    )


def test_a_name_that_is_a_part_of_another_is_made_longer(tmp_path):
    """Hosts look for substrings: ``layers.1`` is in ``layers.10.fc``, ``layers.1.fc`` is not."""
    source = write_model(
        tmp_path / "ct", READ["compressed-tensors"], {"layers.10.fc": random_weight()},
        {"layers.1.fc.weight": torch.zeros(4, 4).half()},
    )  # fmt: skip
    convert_checkpoint(source, tmp_path / "awq", "awq")
    assert settings_of(tmp_path / "awq")["quantization_config"]["modules_to_not_convert"] == ["layers.1.fc"]


@pytest.mark.parametrize("target", ["awq", "kernelgraft"])
def test_names_of_unquantized_modules_are_kept_where_the_key_is_the_same(tmp_path, target):
    quantization = READ["gemm"].config(["gate", "lm_head"])
    source = write_model(tmp_path / "in", READ["gemm"], {"fc": random_weight()}, quantization=quantization)
    convert_checkpoint(source, tmp_path / "out", target)
    written = settings_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert written == ["gate", "lm_head"]


def test_patterns_of_compressed_tensors_are_kept_when_it_is_rewritten(tmp_path):
    quantization = READ["compressed-tensors"].config(["re:.*gate", "lm_head"])
    source = write_model(
        tmp_path / "in", READ["compressed-tensors"], {"fc": random_weight()}, quantization=quantization
    )
    convert_checkpoint(source, tmp_path / "out", "compressed-tensors")
    assert settings_of(tmp_path / "out") == settings_of(source)


def test_weights_for_other_activations_are_refused_and_nothing_is_written(tmp_path):
    source = write_model(tmp_path / "in", READ["gemm"], {"fc": random_weight()})
    with pytest.raises(CheckpointError, match="in holds weights for activations of 16 bits, qoq for those of 8"):
        convert_checkpoint(source, tmp_path / "out", "qoq")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_biases_go_along(tmp_path):
    bias = torch.randn(16).bfloat16()
    source = write_model(tmp_path / "in", READ["gemm"], {"fc": random_weight()}, {"fc.bias": bias})
    for target in AWQ_TARGETS:
        convert_checkpoint(source, tmp_path / target, target)
        same({"bias": tensors_of(tmp_path / target)["fc.bias"]}, {"bias": bias})


def test_scales_that_lose_bits_in_float16_are_told(tmp_path):
    layout = READ["compressed-tensors"]
    tensors = {f"{name}.{part}": t for name in "ab" for part, t in layout.write(random_weight()).items()}
    for name in "ab":
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].bfloat16()
    tensors["b.weight_scale"][0, 0] = 1.1e-7
    source = write_model(tmp_path / "in", layout, {}, tensors)
    assert convert_checkpoint(source, tmp_path / "out", "awq").rounded == ["b"]
    written = tensors_of(tmp_path / "out")
    assert torch.equal(written["a.scales"].T, tensors["a.weight_scale"].half())


def refused(message, source, out, target="awq", *, error=CheckpointError, **settings):
    """Nothing is written, and what is at ``out`` stays; ``message`` is None for errors that have none."""
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        convert_checkpoint(source, out, target, **settings)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    assert not list(out.parent.glob(".*"))


@pytest.fixture
def existing(tmp_path):
    """A model that is in the way."""
    directory = tmp_path / "targets" / "out"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


LAYER = "model.layers.1.mlp.down_proj"
DAMAGES = {
    "qweight": (drop(f"{LAYER}.qweight"), f"{LAYER}: qzeros, scales without qweight"),
    "qzeros": (drop(f"{LAYER}.qzeros"), f"{LAYER}: qzeros is missing, but qweight"),
    "scales": (drop(f"{LAYER}.scales"), f"{LAYER}: scales is missing, but qweight"),
    "shape": (
        put(f"{LAYER}.scales", torch.ones(2, 64).half()), rf"{LAYER}: scales is float16 \(2, 64\), but qweight .*"
        r"goes with float16 or bfloat16 or float32 \(4, 64\) in AutoAWQ GEMM",
    ),
    "dtype": (put(f"{LAYER}.qzeros", torch.ones(4, 8)), rf"{LAYER}: qzeros is float32 \(4, 8\)"),
    "bias": (put(f"{LAYER}.bias", torch.ones(4)), rf"{LAYER}: bias is float32 \(4,\), expected \(64,\)"),
    "act-order": (put(f"{LAYER}.g_idx", torch.ones(4, dtype=torch.int32)), rf"{LAYER}: g_idx .* \(act-order\)"),
    "stray": (put(f"{LAYER}.input_scale", torch.ones(1)), f"{LAYER}: input_scale is no part of a layer"),
    "nan": (put(f"{LAYER}.scales", torch.full((4, 64), float("nan")).half()), f"{LAYER}: scales is not finite"),
    "overflow": (put(f"{LAYER}.scales", torch.full((4, 64), 1e6)), f"{LAYER}: scales is not finite .* in float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_layers_are_refused_by_name(damaged, existing, name):
    change, message = DAMAGES[name]
    refused(message, damaged(tensors=change), existing, overwrite=True)


def test_damaged_files_are_refused_by_name(damaged, existing, quantized):
    directory = damaged(file=lambda file: file.write_bytes(file.read_bytes()[:-1]))
    refused(r"damaged holds a file that is not whole: model\.safetensors", directory, existing, overwrite=True)
    (directory / "model.safetensors").unlink()
    refused(r"damaged holds no \.safetensors, pytorch_model\*\.bin or \.pt file", directory, existing, overwrite=True)
    (directory / "model.pt").write_bytes(b"no")
    refused(r"model\.pt is not a whole file of tensors by torch\.save", directory, existing, overwrite=True)
    torch.save(tensors_of(quantized.directory), directory / "model.pt")
    whole = (directory / "model.pt").read_bytes()
    (directory / "model.pt").write_bytes(whole[: len(whole) // 2])
    refused(r"model\.pt is not a whole file of tensors by torch\.save", directory, existing, overwrite=True)
    (directory / "other.pt").write_bytes(whole)
    refused("holds 2 .pt files; name the one to convert", directory, existing, overwrite=True)
    (directory / "config.json").unlink()
    refused(r"has no config\.json", directory, existing, overwrite=True)


class Code:
    """Something that runs when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Code()}, "is not a whole file of tensors"),
        ([torch.ones(1)], "holds a list, expected named tensors"),
        ({}, "holds a dict, expected named tensors"),
        ({"a": 1}, "a is a int, expected a tensor"),
    ],
    ids=["code", "list", "empty", "number"],
)
def test_nothing_but_tensors_is_unpickled(damaged, existing, capsys, content, message):
    directory = damaged()
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "model.pt")
    refused(message, directory, existing, overwrite=True)
    assert "unpickled" not in capsys.readouterr().out


def test_what_a_target_cannot_hold_is_refused_by_name(tmp_path, existing):
    three = write_model(tmp_path / "three", Native(3, GROUP), {"fc": random_weight(3)})
    for target in ("awq", "compressed-tensors"):
        label = TARGETS[target].label
        refused(f"three has 3 bits, which {label} cannot hold", three, existing, target, overwrite=True)
    odd = {"a": random_weight(), "b": random_weight(n=12)}
    narrow = write_model(tmp_path / "narrow", Native(4, GROUP), odd)
    refused("narrow: b cannot be written: N = 12 and K = 128", narrow, existing, overwrite=True)
    convert_checkpoint(narrow, tmp_path / "fine", "compressed-tensors")


def test_scaled_activations_are_kept_only_where_they_can_be(tmp_path, existing):
    others = {"act.scales": torch.ones(16).half()}
    source = write_model(tmp_path / "in", READ["gemm"], {"fc": random_weight()}, others)
    for target in ("compressed-tensors", "kernelgraft"):
        refused("act.scales scales the output of an activation function", source, existing, target, overwrite=True)
    convert_checkpoint(source, tmp_path / "out", "awq")
    assert torch.equal(tensors_of(tmp_path / "out")["act.scales"], others["act.scales"])


def test_offsets_that_are_no_zero_points_are_refused_with_layer_and_value(tmp_path, existing):
    tensors = {f"fc.{part}": t for part, t in READ["gemv-fast"].write(random_weight()).items()}
    tensors["fc.scaled_zeros"][2, 5] = 0.25
    source = write_model(tmp_path / "in", READ["gemv-fast"], {}, tensors)
    refused(r"fc: scaled_zeros\[2, 5\] = 0\.25 is not minus the scale", source, existing, overwrite=True)


def test_models_that_are_not_ours_to_convert_are_refused(float_llama, damaged, existing):
    refused("has no quantization_config: nothing in it is quantized", float_llama, existing, overwrite=True)
    gptq = damaged(lambda config: config.update(quant_method="gptq"))
    refused("quantization_config has quant_method = 'gptq'", gptq, existing, overwrite=True)


def test_arguments_that_do_not_fit_are_refused(quantized, existing):
    source = quantized.directory

    def wrong(message, target="awq", **settings):
        refused(message, source, existing, target, error=ValueError, overwrite=True, **settings)

    wrong("no target format 'gguf'; there are awq, compressed-tensors, kernelgraft", "gguf")
    wrong("no source format 'gptq'", source_format="gptq", group_size=32)
    wrong("given together or not at all", source_format="llm-awq")
    wrong("given together or not at all", group_size=32)
    refused("exists; pass --overwrite", source, existing, error=FileExistsError)
    for inside in (source, source.parent):
        with pytest.raises(ValueError, match="holds what is to be converted"):
            convert_checkpoint(source, inside, "awq", overwrite=True)


def test_a_failure_on_the_way_leaves_the_target_as_it_was(quantized, existing):
    def stop(name, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    refused(None, quantized.directory, existing, error=KeyboardInterrupt, on_tensor=stop, overwrite=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from kernelgraft_transformers.convert import convert_checkpoint

source, out = map(Path, sys.argv[1:])
kill = lambda name, done, total: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL)
convert_checkpoint(source, out, "kernelgraft", overwrite=True, on_tensor=kill)
"""


def test_a_kill_on_the_way_leaves_the_target_as_it_was(quantized, existing):
    before = {path: path.read_bytes() for path in existing.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, quantized.directory, existing], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert {path: path.read_bytes() for path in existing.iterdir()} == before
    convert_checkpoint(quantized.directory, existing, "kernelgraft", overwrite=True)
    assert describe(existing)["quantized_layers"] == 14


def test_a_full_disk_is_told_before_and_on_the_way(quantized, existing, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    message = r"model\.safetensors cannot be written: .*No space left"
    refused(message, quantized.directory, existing, error=OSError, overwrite=True)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"out needs [\d,]+ bytes, but .* has 1,000 free") as caught:
        convert_checkpoint(quantized.directory, existing, "awq", overwrite=True)
    assert caught.value.errno == errno.ENOSPC


def test_an_existing_model_is_replaced_when_asked(quantized, existing):
    (existing / "stale").touch()
    convert_checkpoint(quantized.directory, existing, "kernelgraft", overwrite=True)
    assert not (existing / "stale").exists()
    assert describe(existing)["layout"]["format"] == "kernelgraft_awq"
    assert transformers.AutoTokenizer.from_pretrained(existing)("w1 w2")["input_ids"]
