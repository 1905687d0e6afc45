"""Keys and values in 4 bits as an attention backend of vLLM, on a CPU.

A token's keys and values are stored quantized as soon as they are known; attention reads what came before the current
chunk of a prompt from the cache, and the chunk itself as it is. Prefixes that are found in the cache, prompts in chunks
and requests that are computed again differ from one another in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVQuantMode

from kernelgraft_core.quant.kv4 import kv4_append, kv4_attention, kv4_row_bytes

from .kv4_selection import CACHE_DTYPE


@dataclass
class KV4Metadata(AttentionMetadata):
    """What attention must know of a batch, as :func:`~kernelgraft_core.quant.kv4.kv4_attention` takes it.

    Attributes:
        tokens: how many there are; tensors of tokens may be longer.
        block_tables: int32 ``(B, blocks)``.
        context_lens: int32 ``(B,)``, tokens of each request that are in the cache before the current ones.
        query_start: int32 ``(B + 1,)``, where the tokens of each request begin.
    """

    tokens: int
    block_tables: Tensor
    context_lens: Tensor
    query_start: Tensor


class KV4MetadataBuilder(AttentionMetadataBuilder[KV4Metadata]):
    """Of a batch, what changes from step to step."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KV4Metadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError(f"--kv-cache-dtype {CACHE_DTYPE} on a CPU: non-causal attention not supported")
        starts = batch.query_start_loc
        return KV4Metadata(
            tokens=batch.num_actual_tokens,
            block_tables=batch.block_table_tensor,
            context_lens=batch.seq_lens - starts.diff(),
            query_start=starts,
        )


class KV4Impl(AttentionImpl[KV4Metadata]):
    """Attention of one layer.

    Raises:
        NotImplementedError: the layer wants something of attention that is not done here; the message says what.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        for what, present in (
            ("ALiBi", alibi_slopes is not None),
            (f"attention type {attn_type}", attn_type != AttentionType.DECODER),
            ("layers that share a cache", kv_sharing_target_layer_name is not None),
            (", ".join(sorted(others)), any(value is not None for value in others.values())),
        ):
            if present:
                raise NotImplementedError(f"--kv-cache-dtype {CACHE_DTYPE} on a CPU: {what} not supported")
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.sliding_window, self.logits_soft_cap = sliding_window, logits_soft_cap or None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the keys and values of tokens, where ``slot_mapping`` is not negative."""
        tokens = len(slot_mapping)
        kv4_append(key[:tokens], value[:tokens], kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KV4Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"--kv-cache-dtype {CACHE_DTYPE} on a CPU: quantized outputs not supported")
        if attn_metadata is None:  # vLLM warms up
            return output.zero_()
        tokens = attn_metadata.tokens
        output[:tokens] = kv4_attention(
            query[:tokens],
            key[:tokens],
            value[:tokens],
            kv_cache,
            attn_metadata.block_tables,
            attn_metadata.context_lens,
            attn_metadata.query_start,
            self.scale,
            window=self.sliding_window,
            softcap=self.logits_soft_cap,
        )
        return output


class KV4Backend(AttentionBackend):
    """vLLM's cache type ``int4_per_token_head`` with the numbers of :mod:`kernelgraft_core.quant.kv4`."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # one of vLLM's own names; it is not registered, so that another plugin may have it

    @staticmethod
    def get_impl_cls() -> type[KV4Impl]:
        return KV4Impl

    @staticmethod
    def get_builder_cls() -> type[KV4MetadataBuilder]:
        return KV4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 2 == 0

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # connectors know vLLM's own layouts of such caches

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.state_content_bytes is not None or spec.kv_quant_mode != KVQuantMode.INT4_PER_TOKEN_HEAD:
            return spec  # layers that --kv-cache-dtype-skip-layers names have another mode
        if spec.head_size_v != spec.head_size:
            raise NotImplementedError(
                f"--kv-cache-dtype {CACHE_DTYPE} on a CPU: heads of {spec.head_size} with values of {spec.head_size_v} "
                "not supported"
            )
        return replace(spec, state_content_bytes=kv4_row_bytes(spec.head_size))
