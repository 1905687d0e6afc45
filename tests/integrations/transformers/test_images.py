"""Calibration on pictures: samples from a model's own processor, and a vision model quantized on them."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from kernelgraft_core.runtime.errors import UnsupportedModelError
from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_transformers.images import draw_image_samples
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

IMAGE = 60
CALIBRATION = Calibration(samples=3, length=24, seed=1)
TEXT = " ".join(f"w{index * 7 % 57 + 3}" for index in range(400))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A random LLaVA of two blocks with its processor, in float16."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = {"<image>": IMAGE, **{f"w{index}": index for index in range(3, IMAGE)}}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w3"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory = tmp_path_factory.mktemp("llava")
    transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=splitter, unk_token="w3", additional_special_tokens=["<image>"]
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        text_config={
            "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.125,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).half().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, color in enumerate(("red", "teal")):
        Image.new("RGB", (20, 30), color).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_samples_show_the_pictures_in_turns_and_fill_up_with_text(llava, pictures):
    samples = draw_image_samples(load_source(str(llava)), pictures, TEXT, CALIBRATION)
    assert len(samples) == 3
    for sample in samples:
        assert sample["input_ids"].shape == (1, CALIBRATION.length)
        assert int((sample["input_ids"] == IMAGE).sum()) == 4
        assert sample["pixel_values"].shape == (1, 3, 16, 16)
    assert not torch.equal(samples[0]["pixel_values"], samples[1]["pixel_values"])
    assert torch.equal(samples[0]["pixel_values"], samples[2]["pixel_values"])
    assert not torch.equal(samples[0]["input_ids"], samples[2]["input_ids"])


def test_only_the_language_tower_is_quantized(llava, pictures, plugin, tmp_path):
    source = load_source(str(llava))
    samples = draw_image_samples(source, pictures, TEXT, CALIBRATION)
    record = quantize_checkpoint(
        source, tmp_path / "out", TEXT, group_size=32, calibration=CALIBRATION, batches=samples
    )
    assert len(record["layers"]) == 14
    assert record["calibration"]["sha256"] != quantized_on_text(source, tmp_path)["calibration"]["sha256"]
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(llava / "model.safetensors")
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    assert packed == {
        n.removesuffix(".weight") for n in original if "layers" in n and "proj" in n and "vision" not in n
    }
    kept = {name for name in original if "vision" in name or "projector" in name}
    assert kept
    assert all(torch.equal(stored[name], original[name]) for name in kept)
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    assert any("vision_tower" in name for name in skipped)
    assert any("projector" in name for name in skipped)

    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    float_model = transformers.AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32)
    with torch.no_grad():
        assert_close("logits", float_model(**samples[0]).logits, loaded(**samples[0]).logits, 0.2)


def quantized_on_text(source, folder):
    return quantize_checkpoint(
        source, folder / "text", TEXT, recipe="rtn", group_size=32, calibration=CALIBRATION, overwrite=True
    )


def test_folders_and_models_without_pictures_are_refused(llava, float_llama, pictures, words, tmp_path):
    source = load_source(str(llava))
    with pytest.raises(ValueError, match="holds no picture"):
        draw_image_samples(source, tmp_path, TEXT, CALIBRATION)
    with pytest.raises(ValueError, match="holds no picture"):
        draw_image_samples(source, tmp_path / "none", TEXT, CALIBRATION)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg is not a picture"):
        draw_image_samples(source, tmp_path, TEXT, CALIBRATION)
    Image.effect_noise((64, 64), 50).save(tmp_path / "broken.jpg")
    whole = (tmp_path / "broken.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"broken\.jpg is not a picture that can be read: image file is truncated"):
        draw_image_samples(source, tmp_path, TEXT, CALIBRATION)
    with pytest.raises(UnsupportedModelError, match="takes no pictures"):
        draw_image_samples(load_source(str(float_llama)), pictures, words, CALIBRATION)
