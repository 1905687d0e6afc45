"""Every model type that the adapters name, as its real class at tiny size.

Float64, with weights, norms and biases all random, so that a fold that is missing or misplaced shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from kernelgraft_core.quant.architectures import Architecture, find_architecture
from kernelgraft_core.runtime import testing

VOCABULARY, TOKENS = 96, 12
IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED, ALONE = {"num_key_value_heads": 2}, {"num_key_value_heads": 4}
WIDE_HEADS = {"head_dim": 16}  # 4 heads of 16 channels in a model of width 32
MIXTURE = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
QWEN_MIXTURE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}


@dataclass(frozen=True)
class Case:
    """A tiny model and how many of its scale groups have a source.

    Attributes:
        build: the config and the class.
        scaled: groups with a source in all blocks together.
        inputs: keyword arguments of a forward pass.
    """

    build: Callable[[], nn.Module]
    scaled: int
    inputs: Callable[[nn.Module], Mapping[str, Tensor]]


def token_ids() -> Tensor:
    return torch.randint(3, IMAGE, (2, TOKENS), generator=testing.rng(3))


def text_only(_: nn.Module) -> Mapping[str, Tensor]:
    return {"input_ids": token_ids()}


def causal(model_type: str, scaled: int, **options: Any) -> Case:
    """A language model of a type, with :data:`TEXT` and ``options`` in its config."""

    def build() -> nn.Module:
        config = transformers.CONFIG_MAPPING[model_type](**{**TEXT, **options})
        # The default for experts is a grouped product that has no float64.
        return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")

    return Case(build, scaled, text_only)


def with_images(
    model_type: str, inputs: Callable[[nn.Module], Mapping[str, Tensor]], scaled: int, **options: Any
) -> Case:
    """A model with a vision tower, whose config gets ``options``."""

    def build() -> nn.Module:
        config = transformers.CONFIG_MAPPING[model_type](**options)
        return transformers.AutoModelForImageTextToText.from_config(config)

    return Case(build, scaled, inputs)


def picture() -> Any:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=testing.rng(5))
    return image.fromarray(np.asarray(pixels))


def with_image_tokens(count: int, *, wrap: bool = False) -> Tensor:
    """One prompt with ``count`` places for an image in its middle."""
    places = [IMAGE] * count
    if wrap:
        places = [START, *places, END]
    text = token_ids()[0].tolist()
    return torch.tensor([[*text[:4], *places, *text[4:]]])


def clip_inputs(_: nn.Module) -> Mapping[str, Tensor]:
    """What LLaVA's own processor makes of a picture and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = {"<image>": IMAGE, **{f"w{index}": index for index in range(3, IMAGE)}}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w3"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=splitter, unk_token="w3", additional_special_tokens=["<image>"]
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    batch = processor(images=[picture()], text=["w5 w6 <image> w7 w8 w9"], return_tensors="pt")
    assert int((batch["input_ids"] == IMAGE).sum()) == 4
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def tiled_inputs(model: nn.Module) -> Mapping[str, Tensor]:
    """A picture of one base tile and one crop, as LLaVA-NeXT and OneVision take it."""
    pixels = torch.randn(1, 2, 3, 16, 16, dtype=torch.float64, generator=testing.rng(5))
    images = {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]])}
    features = model.get_image_features(**images).pooler_output
    return {"input_ids": with_image_tokens(sum(len(f) for f in features)), **images}


def siglip_inputs(_: nn.Module) -> Mapping[str, Tensor]:
    ids = with_image_tokens(4)
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=testing.rng(5))
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}


def qwen_inputs(model: nn.Module) -> Mapping[str, Tensor]:
    """Patches and grid from the models' own image processor; their whole processor needs torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = model.config.vision_config
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=16 * 16,
        max_pixels=32 * 32,
    )
    images = processor([picture()], return_tensors="pt")
    count = int(images["image_grid_thw"].prod()) // vision.spatial_merge_size**2
    ids = with_image_tokens(count, wrap=True)
    return {
        "input_ids": ids,
        "pixel_values": images["pixel_values"].double(),
        "image_grid_thw": images["image_grid_thw"],
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MROPE_3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}


def llava(tower: str, scaled: int, **options: Any) -> Case:
    text = {**TEXT, **GROUPED, "model_type": tower, **options}
    return with_images("llava", clip_inputs, scaled, text_config=text, vision_config=CLIP, image_token_index=IMAGE)


CASES = {
    # three blocks, four groups each: the second of them (attention output) has a source where no head is shared
    "llama": causal("llama", 12, **ALONE),
    "llama-grouped-biases": causal("llama", 9, **GROUPED, attention_bias=True, mlp_bias=True),
    "llama-biases": causal("llama", 12, **ALONE, attention_bias=True, mlp_bias=True),
    "mistral": causal("mistral", 9, **GROUPED, sliding_window=4),
    "qwen2": causal("qwen2", 12, **ALONE),
    "qwen3": causal("qwen3", 12, **ALONE, **WIDE_HEADS),
    "mixtral": causal("mixtral", 3 * (2 + 4), **GROUPED, **MIXTURE, num_local_experts=4),
    "qwen2_moe": causal("qwen2_moe", 4 + 2 * (3 + 6), **ALONE, **QWEN_MIXTURE, shared_expert_intermediate_size=40),
    "qwen3_moe": causal("qwen3_moe", 3 + 2 * (2 + 5), **GROUPED, **WIDE_HEADS, **QWEN_MIXTURE, norm_topk_prob=True),
    "gemma": causal("gemma", 12, **ALONE, **WIDE_HEADS),
    "gemma2": causal("gemma2", 12, **ALONE, **WIDE_HEADS, **WINDOW),
    "gemma3_text": causal("gemma3_text", 9, **GROUPED, **WIDE_HEADS, **WINDOW),
    "phi3": causal("phi3", 12, **ALONE),
    "phi3-grouped": causal("phi3", 9, **GROUPED),
    "opt": causal("opt", 12, ffn_dim=48, word_embed_proj_dim=32),
    "opt-norms-after": causal("opt", 6, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "opt-plain-norms": causal("opt", 6, ffn_dim=48, word_embed_proj_dim=32, layer_norm_elementwise_affine=False),
    "opt-gelu": causal("opt", 9, ffn_dim=48, word_embed_proj_dim=32, activation_function="gelu"),
    "gpt_neox": causal("gpt_neox", 9),
    "gpt_neox-relu": causal("gpt_neox", 12, hidden_act="relu"),
    "gpt_neox-in-sequence": causal("gpt_neox", 9, use_parallel_residual=False),
    "llava": llava("llama", 9),
    "llava-mistral": llava("mistral", 9, sliding_window=None),
    "llava-qwen2": llava("qwen2", 9),
    "llava_next": with_images(
        "llava_next",
        tiled_inputs,
        9,
        text_config={**TEXT, **GROUPED, "model_type": "llama"},
        vision_config=CLIP,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    ),
    "llava_onevision": with_images(
        "llava_onevision",
        tiled_inputs,
        9,
        text_config={**TEXT, **GROUPED, "model_type": "qwen2"},
        vision_config=SIGLIP,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
    ),
    "gemma3": with_images(
        "gemma3",
        siglip_inputs,
        9,
        text_config={**TEXT, **GROUPED, **WIDE_HEADS, **WINDOW},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "qwen2_vl": with_images(
        "qwen2_vl",
        qwen_inputs,
        12,
        text_config={**TEXT, **ALONE, **MROPE},
        vision_config={**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    ),
    "qwen2_5_vl": with_images(
        "qwen2_5_vl",
        qwen_inputs,
        9,
        text_config={**TEXT, **GROUPED, **MROPE},
        vision_config={
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    ),
    "qwen3_vl": with_images(
        "qwen3_vl",
        qwen_inputs,
        9,
        text_config={**TEXT, **GROUPED, **WIDE_HEADS, **MROPE_3},
        vision_config={
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_TOKENS,
    ),
}


MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]


def tiny(case: Case) -> tuple[nn.Module, Architecture]:
    model = case.build().double().eval()
    generator = testing.rng(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if parameter.dim() == 1 and name.endswith("weight"):  # a norm; around 0 or around 1, as it was
            parameter.data += noise.clamp(-2, 2) / 4
        elif parameter.dim() == 1:
            parameter.data = noise / 4
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5
    return model, find_architecture(model)


@torch.no_grad()
def logits(model: nn.Module, case: Case) -> Tensor:
    out: Tensor = model(**case.inputs(model), use_cache=False).logits
    return out


def use_float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms compute in float32, those of Gemma with their weight: here in float64 like everything else."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """While open, norms that convert their input to float32 compute in float64."""
    to = Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        use_float64_throughout(patch)
        patch.setattr(
            Tensor, "to", lambda x, *a, **o: to(x, *(torch.float64 if b is torch.float32 else b for b in a), **o)
        )
        yield


def deviation(after: Tensor, before: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())
