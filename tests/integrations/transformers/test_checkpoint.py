"""Model directories: replaced whole, described from their headers, refused where their parts contradict each other."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_transformers.checkpoint import (
    StoredTensor,
    check_awq_tensors,
    check_replaceable,
    describe,
    load_model,
    read_headers,
    replaced_directory,
)


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
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        describe(directory)


def test_a_wrong_label_is_refused_by_layer(damaged):
    directory = damaged(lambda config: config.update(group_size=16))
    message = r"down_proj\.qzeros is I32 \(4, 8\), but qweight \(128, 8\) with group size 16 goes with I32 \(8, 8\)"
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
        "x": StoredTensor("I32", (3, 4)),
        "s": StoredTensor("F32", ()),
        "y": StoredTensor("BF16", (0, 2)),
    }


def test_a_label_without_packed_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="says quant_method 'awq' but holds no qweight tensor"):
        check_awq_tensors({"a.weight": StoredTensor("F16", (8, 8))}, 128, tmp_path)


@pytest.mark.parametrize("group_size", [0, -2, None, "128", 32.0])
def test_what_is_no_group_size_is_refused(tmp_path, group_size):
    with pytest.raises(CheckpointError, match=f"quantization_config has group_size = {group_size!r}"):
        check_awq_tensors({"a.qweight": StoredTensor("I32", (8, 1))}, group_size, tmp_path)


def test_a_truncated_float_model_is_refused_by_name(model):
    (model / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="model holds a file that is not whole"):
        load_model(str(model), torch.float32)
