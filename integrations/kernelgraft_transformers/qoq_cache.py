"""Keys and values in 4 bits for Transformers' ``generate``: the KV4 cache of QServe (arXiv 2405.04532)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from kernelgraft_core.quant.kv4 import kv4_row_bytes, pack_rows, unpack_rows

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Of ``config.layer_types``: layers with ordinary keys and values. All tokens are kept, whatever the mask hides."""
FIRST_TOKENS = 64  # there is room for as many at first; room doubles when it is used up


class QoQCache(Cache):
    """A cache for decoders with ordinary attention, quantized or not: ``generate(past_key_values=QoQCache(config))``.

    A token's key and value are rounded to 4 bits, with a scale and a lower end for each head, when they are stored:
    tokens of the same forward pass see them as they are, later ones as they were stored
    (:mod:`kernelgraft_core.quant.kv4`). A head of 128 channels takes 136 bytes a token where 16 bits take 512.
    Attention is the model's own, on keys and values that are dequantized layer by layer.

    Args:
        config: the model's.
        max_cache_len: make room for that many tokens at once, and refuse more; by default the cache grows.

    Raises:
        NotImplementedError: the model is an encoder-decoder, or has layers without ordinary keys and values.
        ValueError: ``max_cache_len`` is below 1, or a head has an odd number of channels.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise NotImplementedError(
                f"QoQCache: {config.model_type} is an encoder-decoder, only decoders are supported"
            )
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len is {max_cache_len}, expected at least 1")
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or [KINDS[0]] * text.num_hidden_layers
        if strange := sorted(set(kinds) - set(KINDS)):
            raise NotImplementedError(f"QoQCache: {config.model_type} has layers of type {', '.join(strange)}")
        if getattr(text, "kv_lora_rank", None):
            raise NotImplementedError(f"QoQCache: {config.model_type} caches latent vectors, not keys and values")
        super().__init__(layers=[QoQLayer(max_cache_len) for _ in kinds])

    @property
    def nbytes(self) -> int:
        """Memory of all layers."""
        return sum(layer.rows.nbytes for layer in self.layers if layer.is_initialized)


class QoQLayer(DynamicLayer):
    """The keys and values of one layer, rows uint8 ``(B, H, room, D + 8)`` of which the first are used."""

    def __init__(self, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.rows: Tensor
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                f"QoQCache: keys are {tuple(key_states.shape)} and values {tuple(value_states.shape)}, not alike"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, tokens, channels = key_states.shape
        room = self.max_cache_len or max(FIRST_TOKENS, tokens)
        self.rows = torch.empty(
            (batch, heads, room, kv4_row_bytes(channels)), dtype=torch.uint8, device=key_states.device
        )
        self._length, self.is_initialized = 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values ``(B, H, T, D)`` of a forward pass, and give those of all tokens so far.

        Raises:
            ValueError: the tokens do not fit ``max_cache_len``, or come in another batch than those before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[:2] != self.rows.shape[:2]:
            raise ValueError(
                f"QoQCache holds {tuple(self.rows.shape[:2])} sequences and heads, got {tuple(key_states.shape[:2])}"
            )
        before, after = self._length, self._length + key_states.shape[2]
        self._make_room(after)
        found = key_states, value_states
        if before:
            stored = unpack_rows(self.rows[:, :, :before], key_states.dtype)
            found = torch.cat((stored[0], key_states), 2), torch.cat((stored[1], value_states), 2)
        self.rows[:, :, before:after] = pack_rows(key_states, value_states)
        self._length = after
        return found

    def _make_room(self, tokens: int) -> None:
        room = self.rows.shape[2]
        if tokens <= room:
            return
        if self.max_cache_len is not None:
            raise ValueError(f"QoQCache has room for max_cache_len = {self.max_cache_len} tokens, got {tokens}")
        larger = self.rows.new_empty((*self.rows.shape[:2], max(tokens, 2 * room), self.rows.shape[3]))
        larger[:, :, : self._length] = self.rows[:, :, : self._length]
        self.rows = larger

    def get_seq_length(self) -> int:
        return self._length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len or -1

    def reset(self) -> None:
        """Forget all tokens; memory is kept where ``max_cache_len`` reserved it."""
        self._length = 0
        if self.max_cache_len is None and self.is_initialized:
            del self.rows
            self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: as many as a negative number says, or all but a positive number of them."""
        length = self.get_seq_length()
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        self._length = max(0, keep)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.rows = self.rows.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.rows = self.rows[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("QoQCache does not support beam search: use num_beams=1")

    def offload(self) -> None:
        raise NotImplementedError("QoQCache does not move layers to the CPU and back")

    prefetch = offload
