"""The layouts of decoder blocks: functions from a block to its scale groups."""

from __future__ import annotations

from torch import nn

from kernelgraft_core.quant.experts import count_experts

from .adapter import ScaleGroup, Source, linear_layer


def gated_decoder(
    block: nn.Module, *, mlp_norm: str = "post_attention_layernorm", offset: float = 0.0
) -> tuple[ScaleGroup, ...]:
    """Separate queries, keys and values, and a gated MLP or a mixture of gated experts: Llama and most others.

    Norms of queries and keys need no care: they follow the projections, whose outputs do not change.

    Args:
        mlp_norm: the norm whose output the MLP reads.
        offset: what the norms add to their weight.
    """
    return (
        *_separate_attention(block, _norm(block, "input_layernorm", offset), "self_attn.o_proj"),
        *_feed_forward(block, _norm(block, mlp_norm, offset)),
    )


def phi3(block: nn.Module) -> tuple[ScaleGroup, ...]:
    """Queries, keys and values in one linear layer, gate and up in another."""
    output, down = linear_layer(block, "self_attn.o_proj"), linear_layer(block, "mlp.down_proj")
    heads, inner = output.in_features, down.in_features
    shared = linear_layer(block, "self_attn.qkv_proj").out_features != 3 * heads
    values = None if shared else Source("self_attn.qkv_proj", rows=((2 * heads, 3 * heads),))
    gate, up = (Source("mlp.gate_up_proj", rows=((start, start + inner),)) for start in (0, inner))
    return (
        ScaleGroup(_norm(block, "input_layernorm"), ("self_attn.qkv_proj",), "self_attn", per_token=False),
        ScaleGroup(values, ("self_attn.o_proj",), "self_attn.o_proj"),
        ScaleGroup(_norm(block, "post_attention_layernorm"), ("mlp.gate_up_proj",), "mlp"),
        ScaleGroup(up, ("mlp.down_proj",), "mlp.down_proj", producers=(gate, up)),
    )


def opt(block: nn.Module) -> tuple[ScaleGroup, ...]:
    """LayerNorms and biases, and an MLP without a gate that is not a module of its own."""
    # OPT-350m normalizes after attention and MLP: what the layers read is the residual stream as well.
    before = getattr(block, "do_layer_norm_before", True)
    attention_norm = _norm(block, "self_attn_layer_norm") if before else None
    mlp_norm = _norm(block, "final_layer_norm") if before else None
    return (
        *_separate_attention(block, attention_norm, "self_attn.out_proj"),
        ScaleGroup(mlp_norm, ("fc1",), "fc1"),
        ScaleGroup(_through(block.activation_fn, "fc1"), ("fc2",), "fc2", producers=(Source("fc1"),)),
    )


def gpt_neox(block: nn.Module) -> tuple[ScaleGroup, ...]:
    """Queries, keys and values in one linear layer, head by head, and an MLP without a gate."""
    width = linear_layer(block, "attention.dense").in_features
    size = block.get_submodule("attention").head_size
    assert isinstance(size, int)
    # Each head's rows are its queries, its keys, its values.
    values = tuple((start + 2 * size, start + 3 * size) for start in range(0, 3 * width, 3 * size))
    inner, second = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    return (
        ScaleGroup(_norm(block, "input_layernorm"), ("attention.query_key_value",), "attention", per_token=False),
        ScaleGroup(Source("attention.query_key_value", rows=values), ("attention.dense",), "attention.dense"),
        ScaleGroup(_norm(block, "post_attention_layernorm"), (inner,), "mlp"),
        ScaleGroup(_through(block.get_submodule("mlp").act, inner), (second,), second, producers=(Source(inner),)),
    )


def _separate_attention(block: nn.Module, norm: Source | None, output: str) -> tuple[ScaleGroup, ...]:
    # With grouped-query attention several query heads read one value head. AWQ leaves such layers unscaled; scales
    # shared by those heads were tried and made the quantized model worse (docs/quantization/awq.md).
    alone = linear_layer(block, "self_attn.v_proj").out_features == linear_layer(block, output).in_features
    return (
        ScaleGroup(norm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", per_token=False),
        ScaleGroup(Source("self_attn.v_proj") if alone else None, (output,), output),
    )


def _feed_forward(block: nn.Module, norm: Source | None) -> tuple[ScaleGroup, ...]:
    """One gated MLP, or as many as there are experts; among the latter one may serve all tokens."""
    mlp = block.get_submodule("mlp")
    gated, followers = ["mlp"], []
    if hasattr(mlp, "experts"):
        gated, followers = [f"mlp.experts.{index}" for index in range(count_experts(mlp.experts))], ["mlp.gate"]
        if hasattr(mlp, "shared_expert"):
            gated, followers = ["mlp.shared_expert", *gated], [*followers, "mlp.shared_expert_gate"]
    inner = tuple(f"{path}.{name}" for path in gated for name in ("gate_proj", "up_proj"))
    return (
        ScaleGroup(norm, inner, "mlp", followers=tuple(followers)),
        *(
            ScaleGroup(
                Source(f"{path}.up_proj"),
                (f"{path}.down_proj",),
                f"{path}.down_proj",
                producers=(Source(f"{path}.gate_proj"), Source(f"{path}.up_proj")),
            )
            for path in gated
        ),
    )


def _norm(block: nn.Module, name: str, offset: float = 0.0) -> Source | None:
    """A norm as a source; None when it has no weight."""
    return None if block.get_submodule(name).weight is None else Source(name, offset)


def _through(activation: object, linear: str) -> Source | None:
    """The linear layer in front of an activation, if positive scales pass through: ``relu(x / s) = relu(x) / s``."""
    return Source(linear) if isinstance(activation, nn.ReLU) else None
