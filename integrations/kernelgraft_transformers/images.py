"""Calibration samples that show pictures, made by a model's own processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.errors import UnsupportedModelError

from .texts import Calibration, encode

if TYPE_CHECKING:
    from .quantize import SourceModel

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def draw_image_samples(
    source: SourceModel, folder: Path, text: str, calibration: Calibration
) -> list[Mapping[str, Tensor]]:
    """Batches of one sample each: a picture of the folder, then a passage of the text that fills the sample; a user's
    message where the processor has a chat template.

    Pictures are taken in turns, in the order of their names. Samples vary in length with the picture's own tokens; at
    least a quarter of ``calibration.length`` is text.

    Raises:
        UnsupportedModelError: the model has no processor that takes pictures.
        ValueError: the folder holds no picture, or one that cannot be read; the text is too short.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    processor = load_processor(source)
    passages = calibration.draw(encode(source.tokenizer, text), "the calibration text")
    pictures: dict[Path, Any] = {}
    batches: list[Mapping[str, Tensor]] = []
    for number, passage in enumerate(passages):
        file = files[number % len(files)]
        if file not in pictures:
            pictures[file] = _open(file)
        batches.append(_sample(processor, pictures[file], passage[0], calibration.length))
    return batches


def load_processor(source: SourceModel) -> Any:
    """The processor of a vision model.

    Raises:
        UnsupportedModelError: the model has none that takes pictures.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source.directory)
    if getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(f"{source.name} takes no pictures: its processor is {type(processor).__name__}")
    return processor


def _sample(processor: Any, picture: Any, passage: Tensor, length: int) -> Mapping[str, Tensor]:
    def build(words: Tensor) -> Mapping[str, Tensor]:
        text = processor.tokenizer.decode(words)
        if not processor.chat_template:
            made: Mapping[str, Tensor] = processor(
                images=[picture], text=[f"{processor.image_token} {text}"], return_tensors="pt"
            )
            return made
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        made = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        return made

    # How many tokens the picture takes is known only when the processor has seen it.
    around = build(passage[:1])["input_ids"].shape[1] - 1
    batch = build(passage[: max(length // 4, length - around)])
    return {name: tensor for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}


def _open(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except OSError as error:  # of a cut file it does not say which
        raise ValueError(f"{file} is not a picture that can be read: {error}") from None
