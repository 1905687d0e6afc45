"""quantize_checkpoint: a whole checkpoint with its record, or nothing at all and the old one as it was."""

import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kernelgraft_core.quant.awq import AwqConfig, AwqMethod
from kernelgraft_core.quant.rounding import Scheme, fake_quantize
from kernelgraft_core.runtime.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_transformers import shards
from kernelgraft_transformers.checkpoint import describe
from kernelgraft_transformers.quantize import RECIPES, choose_group_size, load_source, quantize_checkpoint
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
    assert [r.name for block in seen for r in block.outcome.reports] == [layer["name"] for layer in record["layers"]]


SCHEMES = [Scheme(4, -1), Scheme(4, 32, True), Scheme(3, 32), Scheme(3, 64, True), Scheme(3, -1)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_rtn_recipe_rounds_and_does_nothing_else(
    source, tmp_path, round_to_nearest, float_llama, float_tensors, scheme
):
    record = round_to_nearest(source, tmp_path / "out", **asdict(scheme))
    assert record | asdict(scheme) | {"recipe": "rtn"} == record
    found, original = float_tensors(tmp_path / "out"), float_tensors(float_llama)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        if name.endswith("proj.weight"):
            assert torch.equal(found[name], fake_quantize(tensor.float(), scheme)), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, True), Scheme(3, 64), Scheme(3, 32, True)], ids=str)
def test_our_own_layout_holds_every_scheme(source, tmp_path, round_to_nearest, scheme):
    out = tmp_path / "out"
    round_to_nearest(source, out, layout="kernelgraft", **asdict(scheme))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == asdict(scheme) | {
        "quant_method": "kernelgraft_awq", "modules_to_not_convert": None, "format_version": 1,
    }  # fmt: skip
    planes = {"qweight"} if scheme.bits == 4 else {"qweight", "qhigh"}
    layer = "model.layers.1.mlp.down_proj."
    stored = {name.removeprefix(layer) for name in load_file(out / "model.safetensors") if name.startswith(layer)}
    assert stored == planes | {"scales"} | (set() if scheme.symmetric else {"zeros"})


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 64, True)], ids=str)
@pytest.mark.parametrize("recipe", ["awq", "rtn"])
def test_both_layouts_hold_the_same_numbers(source, tmp_path, words, float_tensors, scheme, recipe):
    found = []
    for layout in ("awq", "kernelgraft"):
        out = tmp_path / layout
        quantize_checkpoint(source, out, words, recipe=recipe, layout=layout, calibration=SHORT, **asdict(scheme))
        found.append(float_tensors(out))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_the_layout_is_autoawqs_where_it_holds_the_scheme(source, tmp_path, round_to_nearest):
    assert [round_to_nearest(source, tmp_path / str(bits), bits=bits)["layout"] for bits in (4, 3)] == [
        "awq",
        "kernelgraft",
    ]


@pytest.mark.parametrize("options", [{}, {"bits": 3, "symmetric": True}], ids=str)
def test_activations_on_disk_give_the_same_bytes(source, tmp_path, words, options):
    for name, offload in (("memory", False), ("disk", True)):
        quantize_checkpoint(source, tmp_path / name, words, calibration=SHORT, offload=offload, **options)
    one, other = contents(tmp_path / "memory"), contents(tmp_path / "disk")
    assert {name for name in one if one[name] != other[name]} <= {Path("kernelgraft.json")}  # it holds the time
    assert one.keys() == other.keys()


def llama(**options):
    torch.manual_seed(0)
    options = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} | options
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, num_hidden_layers=1, initializer_range=0.125, **options))


@pytest.fixture
def saved(float_llama, tmp_path):
    """``saved(model)``: its directory, with the tokenizer of ``float_llama``."""

    def save(model, **options):
        directory = tmp_path / "source"
        model.save_pretrained(directory, **options)
        AutoTokenizer.from_pretrained(float_llama).save_pretrained(directory)
        return directory

    return save


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
def test_tied_embeddings_and_biases_survive(saved, plugin, tmp_path, words, float_model, options):
    model = llama(**options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    quantize_checkpoint(load_source(str(saved(model))), tmp_path / "out", words, calibration=SHORT)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == ("tie_word_embeddings" not in options)
    assert ("model.layers.0.mlp.up_proj.bias" in stored) == ("mlp_bias" in options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        wanted, found, original = (m(input_ids=ids).logits for m in (float_model(tmp_path / "out"), loaded, model))
    assert_close("logits", wanted, found, 5e-4)
    assert 0 < (found - original).square().mean() < 0.1 * original.square().mean()


def test_a_head_that_is_stored_although_it_is_tied_is_left_out(saved, tmp_path, round_to_nearest):
    directory = saved(llama(tie_word_embeddings=True))
    stored = load_file(directory / "model.safetensors")
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, directory / "model.safetensors")
    round_to_nearest(load_source(str(directory)), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_source_in_shards_gives_the_same_bytes(float_llama, saved, source, tmp_path, round_to_nearest):
    directory = saved(AutoModelForCausalLM.from_pretrained(float_llama), max_shard_size="30KB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 3
    for name, given in (("one", source), ("many", load_source(str(directory)))):
        round_to_nearest(given, tmp_path / name)
    one, many = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many"))
    assert one == many

    gone = sorted(directory.glob("model-*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names {gone.name}, which is not there"):
        load_source(str(directory))


def test_large_models_are_written_in_shards(source, plugin, tmp_path, round_to_nearest, float_model, monkeypatch):
    limit = 12_000
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    out = tmp_path / "out"
    round_to_nearest(source, out)
    files = sorted(out.glob("model-*-of-*.safetensors"))
    assert [int(file.name[6:11]) for file in files] == list(range(1, len(files) + 1))
    assert len(files) > 3
    stored = [load_file(file) for file in files]
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in stored]
    assert all(size <= limit or len(tensors) == 1 for size, tensors in zip(sizes, stored, strict=True))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: f.name for f, tensors in zip(files, stored, strict=True) for n in tensors}
    assert describe(out)["quantized_layers"] == 14
    with torch.no_grad():
        ids = torch.arange(20).unsqueeze(0)
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
        assert_close("logits", float_model(out)(input_ids=ids).logits, found, 5e-4)

    monkeypatch.undo()
    round_to_nearest(source, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensor, whole[name]) for tensors in stored for name, tensor in tensors.items())

    files[0].unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names {files[0].name}, which is not there"):
        describe(out)


QOQ = {"recipe": "qoq-g64"}
REFUSED = [
    pytest.param({"text": ""}, "the text has 0 tokens; one calibration sample is 16", id="empty-text"),
    pytest.param({"text": "w1 w2 w3"}, "the text has 3 tokens; one calibration sample is 16", id="short"),
    pytest.param({"calibration": Calibration(0, 16)}, "0 samples of 16 tokens", id="no-samples"),
    pytest.param(
        {"recipe": "magic"}, "no recipe 'magic'; there are awq, .*gptq, qoq-chn, qoq-g128, .*rtn", id="recipe"
    ),
    pytest.param(
        {"group_size": 48}, r"layers\.0\.self_attn\.q_proj: K = 64 is no multiple of group size 48", id="group"
    ),
    pytest.param({"group_size": 128}, "K = 64 is no multiple of group size 128", id="large-group"),
    pytest.param({"group_size": 0}, "group size 0 is neither positive nor -1", id="no-group"),
    pytest.param({"bits": 5}, "5 bits per weight; 3 and 4 are supported", id="bits"),
    pytest.param(
        {"layout": "marlin"}, "no format 'marlin'; there are awq, compressed-tensors, kernelgraft", id="layout"
    ),
    pytest.param({"layout": "awq", "bits": 3}, "'awq' does not fit: bits = 3, but AutoAWQ GEMM has 4", id="awq-3"),
    pytest.param({"layout": "qoq"}, "'qoq' does not hold what this recipe yields; possible: awq, ", id="other-layout"),
    pytest.param({**QOQ, "layout": "awq"}, "'awq' does not hold what this recipe yields; possible: qoq", id="qoq-awq"),
    pytest.param({**QOQ, "group_size": 32}, "qoq-g64 is for group size 64, not 32", id="qoq-group"),
    pytest.param({"recipe": "qoq-g128"}, "K = 64 is no multiple of group size 128", id="qoq-large-group"),
    pytest.param({"settings": {"rotate": True}}, "no setting rotate; there are clip_all, clip_steps, ", id="setting"),
    pytest.param({**QOQ, "bits": 3}, "QoQ has asymmetric weights of 4 bits", id="qoq-3"),
    pytest.param({**QOQ, "symmetric": True}, "QoQ has asymmetric weights of 4 bits", id="qoq-symmetric"),
    pytest.param({**QOQ, "settings": {"weight_bits": None}}, "weight_bits=None rounds no weight", id="qoq-no-bits"),
    pytest.param({"batches": []}, "rank 0 of 1 has no calibration samples", id="no-batches"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_input_is_refused_and_changes_nothing(source, tmp_path, words, change, message):
    arguments = {"text": words, "text_name": "the text", "calibration": SHORT} | change
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", **arguments)
    assert leftovers(tmp_path) == []


def test_a_weight_that_is_not_finite_is_refused_by_layer(float_llama, saved, tmp_path, round_to_nearest):
    model = AutoModelForCausalLM.from_pretrained(float_llama)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    spoiled = load_source(str(saved(model)))
    with pytest.raises(NonFiniteError, match=r"weights of model\.layers\.1\.mlp\.up_proj are not finite in 1 of 8192"):
        round_to_nearest(spoiled, tmp_path / "out")
    assert leftovers(tmp_path) == ["source"]


def test_the_source_itself_is_never_replaced(float_llama, saved, round_to_nearest):
    directory = saved(AutoModelForCausalLM.from_pretrained(float_llama))
    before = contents(directory)
    with pytest.raises(ValueError, match="is the model to be quantized; write to another directory"):
        round_to_nearest(load_source(str(directory)), directory, overwrite=True)
    assert contents(directory) == before


@pytest.fixture
def old(tmp_path):
    """A model directory that stands where the new one is to go, with a file that the new one has not."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "stale.bin").write_bytes(b"stale")
    return directory


def test_an_existing_directory_is_refused_before_any_work(source, old, round_to_nearest):
    before, seen = contents(old), []
    with pytest.raises(FileExistsError, match="out exists; pass --overwrite to replace it"):
        round_to_nearest(source, old, on_block=seen.append)
    assert contents(old) == before
    assert seen == []
    assert leftovers(old.parent) == ["out"]


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
@pytest.mark.parametrize("fits", range(6), ids=lambda fits: f"{fits}-files-fit")
def test_a_full_disk_leaves_what_was_there_and_the_next_call_goes_on(
    source, tmp_path, round_to_nearest, monkeypatch, request, there, fits
):
    """The files of a run: two of hidden states and one block, twice over but for the last hidden states; the model."""
    before = contents(request.getfixturevalue("old")) if there else None
    save, written, done = safetensors.torch.save_file, [], []

    def full(tensors, file, **options):
        if len(written) == fits:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        written.append(file)
        save(tensors, file, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        round_to_nearest(source, tmp_path / "out", overwrite=True)
    assert sorted(leftovers(tmp_path)) == ([".out.quantizing", "out"] if there else [".out.quantizing"])
    assert not there or contents(tmp_path / "out") == before

    monkeypatch.undo()
    round_to_nearest(source, tmp_path / "out", overwrite=True, on_block=lambda block: done.append(block.index))
    assert done == ([0, 1] if fits < 5 else [1])
    assert leftovers(tmp_path) == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES


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
def test_a_source_is_read_in_float32_and_written_in_its_16_bit_dtype(
    saved, words, float_tensors, tmp_path, stored, taken
):
    directory, out = saved(llama().to(stored)), tmp_path / "out"
    source = load_source(str(directory))
    assert source.dtype is taken
    quantize_checkpoint(source, out, words, recipe="rtn", calibration=SHORT)
    found, original = float_tensors(out), float_tensors(directory)
    for name, tensor in original.items():
        if name.endswith("proj.weight"):
            assert torch.equal(found[name], fake_quantize(tensor.float(), Scheme(4, 64)))
        else:
            assert found[name].dtype is taken
            assert torch.equal(found[name], tensor.to(taken))
    assert json.loads((out / "config.json").read_text())["dtype"] == str(taken).removeprefix("torch.")


def test_sources_that_cannot_be_quantized_are_refused(quantized, float_llama, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"is quantized already \(awq\)"):
        load_source(str(quantized.directory))
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=10, n_positions=8)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(UnsupportedModelError, match=r"model type 'gpt2'; known: .*llama, .*mistral"):
        load_source(str(tmp_path / "gpt2"))
    with pytest.raises(OSError, match="nothing-here"):
        load_source(str(tmp_path / "nothing-here"))

    cut = tmp_path / "cut"
    AutoModelForCausalLM.from_pretrained(float_llama).save_pretrained(cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut holds a file that is not whole: model.safetensors"):
        load_source(str(cut))


@pytest.mark.parametrize(
    ("recipe", "searches", "rounding"),
    [("awq", True, "nearest"), ("awq+gptq", True, "gptq"), ("gptq", False, "gptq"), ("rtn", False, "nearest")],
)
def test_recipes_are_awq_with_and_without_its_parts(recipe, searches, rounding):
    scheme = Scheme(3, 64, True)
    settings = RECIPES[recipe].settings(scheme)
    assert settings.scheme == scheme
    assert {settings.scale_points > 0, settings.clip_steps > 0, settings.refine_sweeps > 0} == {searches}
    assert settings.rounding == rounding
    assert isinstance(RECIPES[recipe].method(settings), AwqMethod)


def test_settings_of_a_recipe_can_be_given(source, tmp_path, words):
    given = {"scale_points": 4, "clip_steps": 2}
    record = quantize_checkpoint(source, tmp_path / "out", words, calibration=SHORT, settings=given)
    assert record["settings"] == given | {
        name: value for name, value in asdict(AwqConfig()).items() if name not in ("scheme", *given)
    }
    points = {round(point * 4) for search in record["searches"] for _, point, _ in search["curve"]}
    assert points <= {0, 1, 2, 3}


def test_samples_that_are_given_tell_one_job_from_another(source, tmp_path, words):
    """Else a run that was stopped would go on with the hidden states of other samples."""
    digests = []
    for index, batches in enumerate([None, *([{"input_ids": torch.tensor([[5, last]])}] for last in (6, 7))]):
        out = tmp_path / str(index)
        record = quantize_checkpoint(source, out, words, recipe="rtn", calibration=SHORT, batches=batches)
        digests.append(record["calibration"]["sha256"])
    assert len(set(digests)) == 3
    assert digests[0] == hashlib.sha256(words.encode()).hexdigest()
