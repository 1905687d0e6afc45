"""``--kv-cache-dtype int4_per_token_head`` on a CPU, where vLLM has nothing for it: our backend takes it.

Importing this costs nothing; the backend is imported when vLLM builds a model that is served with that cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelgraft_core.runtime.patching import Patches

CACHE_DTYPE = "int4_per_token_head"
_BACKEND = "kernelgraft_vllm.kv4_backend.KV4Backend"


def select_kv4(patches: Patches) -> None:
    """Make vLLM's CPU platform choose :class:`~kernelgraft_vllm.kv4_backend.KV4Backend`; on a GPU, change nothing.

    vLLM has no extension point for this: its CPU platform takes one backend whatever the user names.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    if not current_platform.is_cpu():
        return
    patches.wrap(type(current_platform), "get_attn_backend_cls", _choosing)
    # What was chosen before is remembered, and must not be after.
    forget = selector._cached_get_attn_backend.cache_clear
    forget()
    patches.on_undo("attention backends that vLLM has chosen", forget)


def _choosing(original: Callable[..., str]) -> Callable[..., str]:
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.kv_cache_dtype != CACHE_DTYPE:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        from .kv4_backend import KV4Backend

        reasons = KV4Backend.validate_configuration(**attn_selector_config._asdict(), device_capability=None)
        if reasons:
            raise NotImplementedError(f"--kv-cache-dtype {CACHE_DTYPE} on a CPU: {', '.join(reasons)}")
        return _BACKEND

    return get_attn_backend_cls
