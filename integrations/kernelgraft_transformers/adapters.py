"""LoRA adapters of PEFT on packed layers.

PEFT asks a fixed list of dispatchers which wrapper a layer gets, and none of them takes a layer that is neither an
``nn.Linear`` nor of a library it knows. The one for AWQ is taught about ours, and forgets them when the plugin is
unloaded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.runtime.patching import Patches

log = logging.getLogger("kernelgraft")


def graft_adapters(patches: Patches) -> None:
    """Let ``peft.get_peft_model`` put LoRA on :class:`PackedLinear` layers; nothing happens without PEFT."""
    if find_spec("peft") is None:
        return
    try:
        patches.wrap(import_module("peft.tuners.lora.model"), "dispatch_awq", _with_packed_layers)
    except (ImportError, AttributeError) as error:
        log.warning("LoRA adapters on packed layers are off: this PEFT cannot be used: %s", error)


def _with_packed_layers(dispatch: Callable[..., nn.Module | None]) -> Callable[..., nn.Module | None]:
    from peft.tuners.lora.awq import AwqLoraLinear

    def dispatch_packed(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
        base = getattr(target, "base_layer", target)  # a second adapter comes to the wrapper of the first
        if not isinstance(base, PackedLinear):
            return dispatch(target, adapter_name, config=config, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # it reads the right sizes
            wrapped: nn.Module = AwqLoraLinear(target, adapter_name, config=config, **options)
        return wrapped

    return dispatch_packed
