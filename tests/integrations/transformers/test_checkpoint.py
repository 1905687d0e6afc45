"""Model directories: replaced whole, described from their headers, refused where their parts contradict each other."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.formats.layout import StoredTensor
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_transformers.checkpoint import (
    check_layers,
    check_replaceable,
    copy_companions,
    describe,
    load_model,
    quantization_method,
    read_headers,
    replaced_directory,
)
from kernelgraft_transformers.shards import list_shards


@pytest.fixture
def model(tmp_path):
    """A directory that passes for a model."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_a_new_directory_appears_when_the_block_ends_well(tmp_path):
    with replaced_directory(tmp_path / "a" / "b", overwrite=False) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "file").write_text("text")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "sub" / "file").read_text() == "text"
    assert names(tmp_path / "a") == ["b"]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755


def test_nothing_appears_when_the_block_fails(tmp_path):
    def fill_and_fail():
        with replaced_directory(tmp_path / "new", overwrite=False) as fresh:
            (fresh / "file").write_text("text")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_and_fail()
    assert names(tmp_path) == []


def test_the_old_directory_goes_when_the_new_one_comes(model):
    with replaced_directory(model, overwrite=True) as fresh:
        (fresh / "file").write_text("text")
        assert names(model) == ["config.json"]
    assert names(model) == ["file"]
    assert names(model.parent) == ["model"]


def test_the_old_directory_comes_back_when_the_new_one_cannot_be_put_in_its_place(model, monkeypatch):
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"), replaced_directory(model, overwrite=True):
        pass
    assert names(model) == ["config.json"]
    assert names(model.parent) == ["model"]


def test_what_may_be_replaced(model, tmp_path):
    check_replaceable(tmp_path / "nothing", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty", overwrite=False)
    check_replaceable(model, overwrite=True)
    with pytest.raises(FileExistsError, match="model exists; pass --overwrite"):
        check_replaceable(model, overwrite=False)
    (tmp_path / "file").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="file"):
            check_replaceable(tmp_path / "file", overwrite=overwrite)
    (model / "config.json").rename(model / "notes.txt")
    with pytest.raises(FileExistsError, match="is not a model directory"):
        check_replaceable(model, overwrite=True)


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    with replaced_directory(tmp_path / "empty", overwrite=False) as fresh:
        (fresh / "file").write_text("text")
    assert names(tmp_path / "empty") == ["file"]


def test_a_quantized_model_is_described(quantized):
    found = describe(quantized.directory)
    assert (found["model_type"], found["layers"], found["dtype"]) == ("llama", 2, "float16")
    assert found["quantized_layers"] == 14
    assert found["quantization_config"]["group_size"] == 32
    assert found["record"] == quantized.record
    assert found["bytes"] == (quantized.directory / "model.safetensors").stat().st_size
    packed = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) // 8
    assert found["tensors"]["I32"] == {"tensors": 28, "elements": packed + packed // 32}
    assert found["tensors"]["F16"]["tensors"] == 14 + 2 + 5  # scales, embeddings and head, norms
    json.dumps(found)


def test_a_float_model_is_described(float_llama):
    found = describe(float_llama)
    assert (found["quantization_config"], found["record"], found["quantized_layers"]) == (None, None, 0)
    assert found["tensors"].keys() == {"F16"}


def test_what_is_no_model_directory_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a model directory: it has no config\.json"):
        describe(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model holds no \.safetensors file"):
        describe(model)
    for text, message in (("{", "is not JSON"), ("[]", "holds a list, expected an object")):
        (model / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
            describe(model)


def test_a_truncated_file_is_refused_by_name(damaged):
    directory = damaged(file=lambda file: file.write_bytes(file.read_bytes()[:-1]))
    with pytest.raises(CheckpointError, match=r"holds a file that is not whole: model\.safetensors"):
        describe(directory)


def test_a_wrong_label_is_refused_by_layer(damaged):
    directory = damaged(lambda config: config.update(group_size=16))
    message = r"down_proj: qzeros is int32 \(4, 8\), but qweight \(128, 8\) with group size 16 goes with int32 \(8, 8\)"
    with pytest.raises(CheckpointError, match=message):
        describe(directory)


def test_autoawqs_own_name_of_the_group_size_is_known(damaged):
    def rename(config):
        config["q_group_size"] = config.pop("group_size")

    assert describe(damaged(rename))["quantized_layers"] == 14


def test_headers_are_read_without_the_tensors(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({"x": torch.zeros(3, 4, dtype=torch.int32), "s": torch.tensor(1.0)}, files[0])
    save_file({"y": torch.zeros(0, 2, dtype=torch.bfloat16)}, files[1])
    assert read_headers(files) == {
        "x": StoredTensor(torch.int32, (3, 4)),
        "s": StoredTensor(torch.float32, ()),
        "y": StoredTensor(torch.bfloat16, (0, 2)),
    }


FLOAT = StoredTensor(torch.float16, (8, 8))


def layer_of(layout, n, k, name):
    return {f"{name}.{part}": wanted.written for part, wanted in layout.parts(n, k).items()}


@pytest.mark.parametrize("layout", [Gemm(group_size=32), PackQuantized(group_size=32)])
def test_layers_are_found_with_their_sizes(tmp_path, layout):
    stored = layer_of(layout, 16, 64, "a.b") | layer_of(layout, 8, 32, "c")
    stored |= {"a.b.bias": StoredTensor(torch.float16, (16,)), "norm.weight": FLOAT}
    assert check_layers(stored, layout, tmp_path) == {"a.b": (16, 64), "c": (8, 32)}


def test_a_label_without_packed_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="says that it is AutoAWQ GEMM but holds no qweight tensor"):
        check_layers({"a.weight": FLOAT}, Gemm(), tmp_path)


def test_a_layer_that_lost_a_tensor_is_refused_by_name(tmp_path):
    whole = layer_of(Gemm(group_size=32), 16, 64, "a") | layer_of(Gemm(group_size=32), 16, 64, "b")
    for part in ("qzeros", "scales"):
        with pytest.raises(CheckpointError, match=f"b: {part} is missing, but qweight"):
            check_layers({n: t for n, t in whole.items() if n != f"b.{part}"}, Gemm(group_size=32), tmp_path)
    with pytest.raises(CheckpointError, match="b: qzeros, scales without qweight"):
        check_layers({n: t for n, t in whole.items() if n != "b.qweight"}, Gemm(group_size=32), tmp_path)


def test_the_scale_of_an_activation_is_no_layer(tmp_path):
    stored = layer_of(Gemm(group_size=32), 16, 64, "fc") | {"act.scales": StoredTensor(torch.float16, (16,))}
    assert check_layers(stored, Gemm(group_size=32), tmp_path) == {"fc": (16, 64)}


def test_the_layout_is_described(quantized):
    assert describe(quantized.directory)["layout"] == {
        "format": "AutoAWQ GEMM", "bits": 4, "group_size": 32, "symmetric": False,
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"bits": 8}, {"quant_method": "gptq"}, {"group_size": 0}])
def test_a_model_in_another_layout_is_described_without_one(damaged, change):
    found = describe(damaged(lambda config: config.update(change)))
    assert (found["layout"], found["quantized_layers"]) == (None, 14)


def test_autoawqs_file_of_its_own_is_read(damaged):
    directory = damaged()
    settings = json.loads((directory / "config.json").read_text())
    del settings["quantization_config"]
    (directory / "config.json").write_text(json.dumps(settings))
    assert describe(directory)["layout"] is None
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (directory / "quant_config.json").write_text(json.dumps(old))
    assert describe(directory)["layout"]["group_size"] == 32


def test_the_same_weights_in_another_form_are_left_out_as_transformers_does(damaged):
    directory = damaged()
    (directory / "consolidated.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    assert list_shards(directory) == [directory / "model.safetensors"]
    assert describe(directory)["bytes"] == (directory / "model.safetensors").stat().st_size


def test_an_index_that_promises_more_than_the_files_hold_is_refused(damaged):
    directory = damaged()
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "gone.weight": "model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json says that model\.safetensors holds gone\.weight"):
        describe(directory)


def test_what_lies_beside_the_weights_is_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["tokenizer.json", "chat_template.jinja", "tokenizer.model", "modeling.py", "preprocessor_config.json"]
    left = ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "a.pt", ".hidden"]
    for name in kept + left:
        (source / name).write_text(name)
    (source / "folder").mkdir()
    copy_companions(source, target)
    assert names(target) == sorted(kept)
    assert (target / "modeling.py").read_text() == "modeling.py"


def test_a_quantization_that_nothing_reads_is_refused_not_filled_with_noise(damaged):
    directory = damaged(lambda config: config.update(quant_method="qoq"))
    with pytest.raises(CheckpointError, match="is quantized, quant_method 'qoq', which neither Transformers nor"):
        load_model(str(directory), torch.float32)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../some/model", "three/part/name"])
def test_a_directory_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(CheckpointError, match=f"there is no model directory {name}"):
        quantization_method(name)


def test_the_method_of_a_model_is_read_from_its_config(damaged, float_llama):
    assert quantization_method(str(damaged())) == "awq"
    assert quantization_method(str(float_llama)) is None


def test_a_truncated_float_model_is_refused_by_name(model):
    (model / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="model holds a file that is not whole"):
        load_model(str(model), torch.float32)
