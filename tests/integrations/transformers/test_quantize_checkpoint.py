"""quantize_checkpoint: a whole checkpoint with its record, or nothing at all and the old one as it was."""

import errno
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kernelgraft_core.quant.rounding import fake_quantize
from kernelgraft_core.runtime.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_transformers import quantize as module
from kernelgraft_transformers.checkpoint import describe
from kernelgraft_transformers.quantize import SourceModel, choose_group_size, load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

FILES = {"config.json", "generation_config.json", "kernelgraft.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"}  # fmt: skip
SHORT = Calibration(samples=2, length=16)


@pytest.fixture
def source(float_llama):
    return load_source(str(float_llama))


@pytest.fixture
def round_to_nearest(words):
    """The quickest way to a checkpoint."""
    return functools.partial(quantize_checkpoint, text=words, recipe="rtn", calibration=SHORT)


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def leftovers(directory):
    return [p.name for p in directory.iterdir()]


def test_the_record_says_how_the_model_was_made(quantized, float_llama, words, calibration):
    record = quantized.record
    assert record == json.loads((quantized.directory / "kernelgraft.json").read_text())
    assert {p.name for p in quantized.directory.iterdir()} == FILES
    assert (record["format"], record["recipe"], record["bits"], record["group_size"]) == (1, "awq", 4, 32)
    assert record["source"] == str(float_llama)
    assert record["calibration"] | asdict(calibration) == record["calibration"]
    assert record["calibration"]["text"] == "words"
    assert record["calibration"]["text_tokens"] == 2000
    assert len(record["calibration"]["sha256"]) == 64
    assert record["settings"]["scale_points"] == 20
    assert record["seconds"] > 0
    assert record["environment"].keys() == {"python", "torch", "machine"}
    layers = {layer["name"]: layer for layer in record["layers"]}
    assert len(layers) == 14
    assert all(0 < layer["error_after"] < 1 and 0 < layer["error_before"] < 1 for layer in layers.values())


def test_the_config_is_the_models_own_with_the_awq_entry(quantized, float_llama):
    config = json.loads((quantized.directory / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    original = json.loads((float_llama / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    assert config["dtype"] == "float16"


def test_the_tokenizer_comes_along(quantized, float_llama):
    ours, original = (AutoTokenizer.from_pretrained(d) for d in (quantized.directory, float_llama))
    assert ours("w1 w95 other").input_ids == original("w1 w95 other").input_ids
    assert ours.eos_token == "</s>"


def test_blocks_are_reported_as_they_are_done(source, tmp_path, words):
    seen = []
    record = quantize_checkpoint(source, tmp_path / "out", words, recipe="rtn", calibration=SHORT, on_block=seen.append)
    assert [(block.index, block.count) for block in seen] == [(0, 2), (1, 2)]
    assert [r.name for block in seen for r in block.reports] == [layer["name"] for layer in record["layers"]]


def test_the_rtn_recipe_rounds_and_does_nothing_else(source, tmp_path, round_to_nearest, float_llama):
    original = load_file(float_llama / "model.safetensors")
    record = round_to_nearest(source, tmp_path / "out", group_size=-1)
    assert (record["recipe"], record["group_size"]) == ("rtn", -1)
    for name, tensor in source.model.state_dict().items():
        packed = name.endswith("proj.weight")
        assert torch.equal(tensor, fake_quantize(original[name].float(), -1) if packed else original[name].float())


def llama(**options):
    torch.manual_seed(0)
    options = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} | options
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, num_hidden_layers=1, initializer_range=0.125, **options))


@pytest.mark.parametrize(
    ("hidden", "inner", "size"),
    [(128, 256, 128), (128, 320, 64), (64, 128, 64), (64, 96, 32), (256, 384, 128)],
)
def test_auto_takes_the_largest_size_that_divides_every_layer(hidden, inner, size):
    with torch.device("meta"):
        model = llama(hidden_size=hidden, intermediate_size=inner)
    assert choose_group_size(model) == size


def test_auto_that_finds_no_size_says_why():
    with torch.device("meta"):
        model = llama(intermediate_size=72)
    with pytest.raises(ValueError, match=r"no group size of \(128, 64, 32\) divides every K of the model: \[64, 72\]"):
        choose_group_size(model)


def test_auto_is_the_default(source, tmp_path, round_to_nearest):
    assert round_to_nearest(source, tmp_path / "out")["group_size"] == 64


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_tied_embeddings_and_biases_survive(source, plugin, tmp_path, words, options):
    model = llama(**options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    quantize_checkpoint(replace(source, model=model), tmp_path / "out", words, calibration=SHORT)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == ("tie_word_embeddings" not in options)
    assert ("model.layers.0.mlp.up_proj.bias" in stored) == ("mlp_bias" in options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        # What is not packed was float32 and is stored as float16.
        assert_close("logits", model(input_ids=ids).logits, loaded(input_ids=ids).logits, 2e-3)


def test_large_models_are_written_in_shards(source, plugin, quantized, tmp_path, round_to_nearest, monkeypatch):
    split = huggingface_hub.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        huggingface_hub, "split_torch_state_dict_into_shards", functools.partial(split, max_shard_size="30KB")
    )
    out = tmp_path / "out"
    round_to_nearest(source, out)
    files = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(files) > 1
    assert describe(out)["quantized_layers"] == 14
    with torch.no_grad():
        ids = torch.arange(20).unsqueeze(0)
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
        assert_close("logits", source.model(input_ids=ids).logits, found, 5e-4)
    files[0].unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names {files[0].name}, which is not there"):
        describe(out)


def spoiled(source):
    source.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan


REFUSED = [
    pytest.param({"text": ""}, ValueError, "the text has 0 tokens; one calibration sample is 16", id="empty-text"),
    pytest.param({"text": "w1 w2 w3"}, ValueError, "the text has 3 tokens; one calibration sample is 16", id="short"),
    pytest.param({"calibration": Calibration(0, 16)}, ValueError, "0 samples of 16 tokens", id="no-samples"),
    pytest.param({"recipe": "gptq"}, ValueError, "no recipe 'gptq'; there are awq, rtn", id="recipe"),
    pytest.param({"group_size": 48}, ValueError, r"layers\.0\.self_attn\.q_proj: group size 48 does not", id="group"),
    pytest.param({"group_size": 128}, ValueError, "group size 128 does not divide K = 64", id="large-group"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_bad_input_is_refused_and_changes_nothing(source, tmp_path, words, change, error, message):
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    arguments = {"text": words, "text_name": "the text", "calibration": SHORT} | change
    with pytest.raises(error, match=message):
        quantize_checkpoint(source, tmp_path / "out", **arguments)
    assert leftovers(tmp_path) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.model.state_dict().items())


def test_a_weight_that_is_not_finite_is_refused_by_layer(source, tmp_path, round_to_nearest):
    spoiled(source)
    with pytest.raises(NonFiniteError, match=r"weights of model\.layers\.1\.mlp\.up_proj are not finite in 1 of 8192"):
        round_to_nearest(source, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.fixture
def old(tmp_path):
    """A model directory that stands where the new one is to go, with a file that the new one has not."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "stale.bin").write_bytes(b"stale")
    return directory


def test_an_existing_directory_is_refused_before_the_model_changes(source, old, round_to_nearest):
    before = contents(old), source.model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(FileExistsError, match="out exists; pass --overwrite to replace it"):
        round_to_nearest(source, old)
    assert contents(old) == before[0]
    assert torch.equal(source.model.model.layers[0].mlp.up_proj.weight, before[1])


def test_overwriting_leaves_nothing_of_the_old_directory(source, old, round_to_nearest):
    round_to_nearest(source, old, overwrite=True)
    assert {p.name for p in old.iterdir()} == FILES
    assert leftovers(old.parent) == ["out"]


def test_a_directory_that_holds_no_model_is_never_overwritten(source, old, round_to_nearest):
    (old / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"out is not a model directory \(no config.json\)"):
        round_to_nearest(source, old, overwrite=True)
    assert leftovers(old) == ["stale.bin"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "old-there"])
def test_a_full_disk_leaves_what_was_there(source, tmp_path, round_to_nearest, monkeypatch, request, there):
    before = contents(request.getfixturevalue("old")) if there else None

    def full(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        round_to_nearest(source, tmp_path / "out", overwrite=True)
    assert leftovers(tmp_path) == (["out"] if there else [])
    assert not there or contents(tmp_path / "out") == before


KILLED = """
import os, sys
from pathlib import Path
import safetensors.torch
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

def die(tensors, file, **_):
    Path(file).write_bytes(b"half")
    os._exit(9)

safetensors.torch.save_file = die
source, out = sys.argv[1:]
text = " ".join(f"w{i % 96}" for i in range(200))
quantize_checkpoint(
    load_source(source), Path(out), text, recipe="rtn", calibration=Calibration(1, 16), overwrite=True
)
"""


def test_being_killed_leaves_what_was_there(float_llama, old):
    before = contents(old)
    command = [sys.executable, "-c", KILLED, str(float_llama), str(old)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 9
    assert contents(old) == before
    assert all(name == "out" or name.startswith(".") for name in leftovers(old.parent))


@pytest.mark.parametrize(
    ("stored", "taken"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_a_source_is_read_in_float32_and_written_in_its_16_bit_dtype(float_llama, tmp_path, stored, taken):
    AutoModelForCausalLM.from_pretrained(float_llama, dtype=stored).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(float_llama).save_pretrained(tmp_path)
    source = load_source(str(tmp_path))
    assert (source.dtype, source.model.dtype, source.model.training) == (taken, torch.float32, False)
    assert isinstance(source, SourceModel)


def test_sources_that_cannot_be_quantized_are_refused(quantized, float_llama, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"is quantized already \(awq\)"):
        load_source(str(quantized.directory))
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=10, n_positions=8)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(UnsupportedModelError, match="model type 'gpt2'; known: llama, mistral"):
        load_source(str(tmp_path / "gpt2"))
    with pytest.raises(OSError, match="nothing-here"):
        load_source(str(tmp_path / "nothing-here"))

    cut = tmp_path / "cut"
    AutoModelForCausalLM.from_pretrained(float_llama).save_pretrained(cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut holds a file that is not whole"):
        load_source(str(cut))


def test_awq_is_a_recipe_and_so_is_what_it_is_compared_with():
    assert module.RECIPES.keys() == {"awq", "rtn"}
    assert (module.RECIPES["rtn"].scale_points, module.RECIPES["rtn"].clip_steps) == (0, 0)
