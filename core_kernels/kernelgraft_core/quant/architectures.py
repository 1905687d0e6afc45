"""Where the linear layers of a decoder sit: all that a quantizer has to know about a model family.

Names are those of ``torch.nn`` submodules, so nothing here imports a host.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kernelgraft_core.runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class ScaleGroup:
    """Linear layers that read the same activations, so that one scale per input channel serves them all.

    Attributes:
        source: the norm or linear layer that produces the activations; its output channels are divided by the scales.
            None where no layer can take them: such a group is rounded without scales.
        targets: the linear layers whose input channels are multiplied by them.
        inspect: the module whose output tells how good the scales are.
        per_token: the inspected module treats every token by itself, so that it can be judged on scattered tokens.
    """

    source: str | None
    targets: tuple[str, ...]
    inspect: str
    per_token: bool = True


@dataclass(frozen=True)
class Architecture:
    """A family of decoders.

    Attributes:
        model_types: ``config.model_type`` of the models it describes.
        blocks: path of the ``nn.ModuleList`` of decoder blocks.
        unclipped: endings of layer names whose weights are not clipped: clipping queries and keys harms the softmax.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    unclipped: tuple[str, ...] = ("q_proj", "k_proj")

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        blocks = model.get_submodule(self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModelError(f"{self.blocks} of {type(model).__name__} is {type(blocks).__name__}")
        return blocks

    def scale_groups(self, block: nn.Module) -> tuple[ScaleGroup, ...]:
        """The groups of one block, in the order in which they may be scaled."""
        value, output = linear_layer(block, "self_attn.v_proj"), linear_layer(block, "self_attn.o_proj")
        # With grouped-query attention several query heads read one value head. AWQ leaves such layers unscaled; scales
        # shared by those heads were tried and made the quantized model worse (docs/quantization/awq.md).
        value_source = "self_attn.v_proj" if value.out_features == output.in_features else None
        return (
            ScaleGroup(
                "input_layernorm",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "self_attn",
                per_token=False,
            ),
            ScaleGroup(value_source, ("self_attn.o_proj",), "self_attn.o_proj"),
            ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
            ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
        )


ARCHITECTURES = (Architecture("Llama", ("llama", "mistral"), "model.layers"),)


def find_architecture(model: nn.Module) -> Architecture:
    """The adapter of a model, by its ``config.model_type``.

    Raises:
        UnsupportedModelError: no adapter knows the type; the message lists the known ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(sorted(t for a in ARCHITECTURES for t in a.model_types))
    raise UnsupportedModelError(f"no quantization adapter for model type {model_type!r}; known: {known}")


def linear_layer(block: nn.Module, name: str) -> nn.Linear:
    """A linear layer of a block by name.

    Raises:
        UnsupportedModelError: there is none, or it is of another type (a layer that is quantized already, say).
    """
    try:
        layer = block.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(f"{type(block).__name__} has no layer {name}") from None
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{name} of {type(block).__name__} is {type(layer).__name__}, expected Linear")
    return layer
