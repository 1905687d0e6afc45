"""The families that can be quantized, and how others add theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kernelgraft_core.runtime.errors import UnsupportedModelError

from .adapter import Architecture
from .attention import fused_attention, interleaved_attention, separate_attention
from .layouts import gated_decoder, gpt_neox, opt, phi3

DECODER = ("model.layers",)
# Transformers 5, and the paths of earlier releases and of towers that are causal language models themselves.
TOWER = ("model.language_model.layers", "language_model.model.layers", "language_model.layers")

_gemma_attention = partial(separate_attention, norm_offset=1.0)
_opt_attention = partial(separate_attention, output="self_attn.out_proj", rotary=False)
_gemma = partial(gated_decoder, mlp_norm="pre_feedforward_layernorm", offset=1.0)

ARCHITECTURES = (
    Architecture("Llama", ("llama", "mistral"), DECODER, gated_decoder, attention=separate_attention),
    Architecture("Qwen", ("qwen2", "qwen3"), DECODER, gated_decoder, attention=separate_attention),
    Architecture("Mixtral", ("mixtral",), DECODER, gated_decoder, attention=separate_attention),
    Architecture("Qwen-MoE", ("qwen2_moe", "qwen3_moe"), DECODER, gated_decoder, attention=separate_attention),
    Architecture("Gemma", ("gemma",), DECODER, partial(gated_decoder, offset=1.0), attention=separate_attention),
    Architecture("Gemma 2 and 3", ("gemma2", "gemma3_text"), DECODER, _gemma, attention=_gemma_attention),
    Architecture("Gemma 3 with images", ("gemma3",), TOWER, _gemma, attention=_gemma_attention),
    Architecture("Phi-3", ("phi3",), DECODER, phi3, unclipped=("qkv_proj",), attention=fused_attention),
    Architecture(
        "OPT",
        ("opt",),
        ("model.decoder.layers",),
        opt,
        attention=_opt_attention,
        writers=("model.decoder.embed_positions",),
    ),
    Architecture(
        "GPT-NeoX",
        ("gpt_neox",),
        ("gpt_neox.layers",),
        gpt_neox,
        unclipped=("query_key_value",),
        attention=interleaved_attention,
    ),
    Architecture(
        "LLaVA",
        ("llava", "llava_next", "llava_onevision"),
        TOWER,
        gated_decoder,
        towers=("llama", "mistral", "qwen2"),
        attention=separate_attention,
        writers=("*multi_modal_projector.linear_2", "*image_newline"),
    ),
    Architecture(
        "Qwen-VL",
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        TOWER,
        gated_decoder,
        attention=separate_attention,
        writers=("*visual.merger.mlp.2", "*visual.merger.linear_fc2", "*visual.deepstack_merger_list.*.linear_fc2"),
    ),
)

_registered: dict[object, Architecture] = {}  # by registration: adapters may be equal


def register_architecture(architecture: Architecture) -> Callable[[], None]:
    """Make a family known to every quantizer; the returned function takes it out again, once.

    Raises:
        ValueError: it names no model type or no path, or one of its model types is known already.
    """
    if not architecture.model_types or not architecture.blocks:
        raise ValueError(f"the adapter {architecture.name!r} names no model types or no path of blocks")
    known = _by_type()
    for model_type in architecture.model_types:
        if model_type in known:
            raise ValueError(f"model type {model_type!r} has an adapter already: {known[model_type].name}")
    registration = object()
    _registered[registration] = architecture
    return lambda: _forget(registration)


def find_architecture(model: nn.Module) -> Architecture:
    """The adapter of a model, by its ``config.model_type``.

    Raises:
        UnsupportedModelError: no adapter knows the type; the message lists the known ones and says how to add one.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    known = _by_type()
    if model_type in known:
        return known[model_type]
    raise UnsupportedModelError(
        f"no quantization adapter for model type {model_type!r}; known: {', '.join(sorted(known))}. To add one, "
        "register an Architecture that says where the decoder blocks are and which linear layers of a block read the "
        "same activations (docs/quantization/architectures.md)"
    )


def _forget(registration: object) -> None:
    _registered.pop(registration, None)


def _by_type() -> dict[str, Architecture]:
    return {model_type: a for a in (*ARCHITECTURES, *_registered.values()) for model_type in a.model_types}
