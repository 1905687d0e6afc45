"""The experts of a mixture inside vLLM: loaded one by one in the checkpoint's layout, run in the kernels', on CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from kernelgraft_core.quant.formats.layout import Layout, Part, StoredTensor
from kernelgraft_core.quant.w3a16 import W3A16Weight
from kernelgraft_core.quant.w4a16 import W4A16Weight

from .loaders import checked, on_each
from .routed_experts import ACTIVATIONS, routed_experts

_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""vLLM's names: gates (w1) and ups (w3) of all experts share parameters, downs have their own."""


class KernelgraftExpertsMethod(FusedMoEMethodBase):
    """Parameters, repacking and forward of the experts of one layer.

    Args:
        layer: of vLLM, still without parameters.
        layout: how the checkpoint stores one projection of one expert.
        k_first: whether the first dimension of its tensors is along K.
        prefix: name of the layer, for messages.

    Raises:
        NotImplementedError: the layer is not computed here; the message says why.
    """

    def __init__(self, layer: Any, layout: Layout, k_first: bool, prefix: str) -> None:
        super().__init__(layer.moe_config)
        if reason := _why_not(layer, self.moe):
            raise NotImplementedError(f"{prefix}: {reason}")
        self.layout = layout
        self.k_first = k_first
        self.prefix = prefix
        self._local: dict[str, Layout] = {}
        self._stored: tuple[str, ...] = ()
        self._awaited: set[tuple[int, str, str]] = set()
        kind = W4A16Weight if layout.bits == 4 else W3A16Weight
        self._computed = (*kind.planes, "scales", "zeros")

    def create_weights(
        self,
        layer: Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the empty tensors of this rank's shard, ``w13_qweight`` and so on; scales are float16 as in the file.

        Raises:
            ValueError: the layout cannot hold this rank's share of a projection.
        """
        ranks, inner = self.moe.tp_size, intermediate_size_per_partition
        for stem, n, k, whole_n, whole_k in (
            ("w13", inner, hidden_size, inner * ranks, hidden_size),
            ("w2", hidden_size, inner, hidden_size, inner * ranks),
        ):
            # A group that spans all of K is shared by the ranks; any other belongs to one.
            shared = self.layout.group_size in (-1, whole_k)
            local = self._local[stem] = replace(self.layout, group_size=-1) if shared else self.layout
            try:
                in_file = self.layout.parts(whole_n, whole_k)
                local.parts(n, k)
                parts = local.parts(n * len(_SHARDS[stem]), k)
            except ValueError as error:
                raise ValueError(f"{self.prefix}: {stem}{on_each(ranks)}: {error}") from None
            self._stored = tuple(parts)
            strategy = FusedMoeWeightScaleSupported.CHANNEL if shared else FusedMoeWeightScaleSupported.GROUP
            for name, part in parts.items():
                empty = torch.empty((num_experts, *part.shape), dtype=part.dtypes[0])
                parameter = Parameter(empty, requires_grad=False)
                attributes = {
                    "weight_loader": self._checked(extra_weight_attrs["weight_loader"], name, in_file[name]),
                    "is_transposed": self.k_first,
                    "quant_method": strategy.value,
                }
                set_weight_attrs(parameter, attributes)
                layer.register_parameter(f"{stem}_{name}", parameter)
                self._awaited |= {(e, shard, name) for shard in _SHARDS[stem] for e in range(num_experts)}

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace the loaded parameters by those of the kernels' weights, stacked.

        Raises:
            ValueError: a tensor of an expert is missing, a scale is NaN or infinite, or a zero point has too many bits.
        """
        experts = len(layer.get_parameter(f"w2_{self.layout.packed}"))
        # vLLM's dummy weights, with which it measures, go past the loaders: then all are missing.
        if self._awaited and len(self._awaited) < 3 * experts * len(self._stored):
            expert, shard, name = min(self._awaited)
            raise ValueError(
                f"{self.prefix}: the checkpoint has no {name} for {shard} of expert {expert} "
                f"({len(self._awaited)} tensors are missing)"
            )
        for stem, local in self._local.items():
            stored = {name: layer.get_parameter(f"{stem}_{name}").data for name in self._stored}
            if not stored[local.scale].isfinite().all():
                raise ValueError(f"{self.prefix}: scales in the checkpoint are not all finite")
            try:
                read = [local.read({name: tensor[e] for name, tensor in stored.items()}) for e in range(experts)]
            except ValueError as error:
                raise ValueError(f"{self.prefix}: {stem}: {error}") from None
            for name in self._stored:
                delattr(layer, f"{stem}_{name}")
            for name, tensors in zip(
                self._computed, zip(*(weight.tensors for weight in read), strict=True), strict=True
            ):
                layer.register_parameter(f"{stem}_{name}", Parameter(torch.stack(tensors), requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Module) -> None:
        """None: it would describe the tensors to vLLM's kernels."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Weighted sum of each token's experts; shared ones are vLLM's to add."""
        gate_up, down = ([getattr(layer, f"{stem}_{name}") for name in self._computed] for stem in _SHARDS)
        out: Tensor = routed_experts(x, topk_weights, topk_ids, gate_up, down, layer.activation.value)
        return out

    def _checked(self, loader: Callable[..., Any], name: str, part: Part) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> Any:
            look = checked(
                loader,
                f"{self.prefix}: {name} for {shard_id} of expert {expert_id}",
                lambda tensor: part.fits(StoredTensor.of(tensor)),
                f"{part} in {self.layout.label} with group size {self.layout.group_size}",
            )
            # vLLM decides by the name what kind of tensor this is, and has not heard of this one.
            known_name = weight_name.replace("qhigh", "qweight")
            loaded = look(param, loaded_weight, known_name, shard_id, expert_id, return_success=return_success)
            self._awaited.discard((expert_id, shard_id, name))
            return loaded

        return load


def _why_not(layer: Any, moe: FusedMoEConfig) -> str | None:
    """Why the experts of ``layer`` are not computed here, or None."""
    if not current_platform.is_cpu():
        return f"quantized experts on {current_platform.device_type} need a host synchronization per layer; not written"
    if moe.use_ep or moe.dp_size > 1:
        return f"expert and data parallelism are not supported, found {moe.ep_size} x {moe.dp_size} ranks"
    if moe.activation.value not in ACTIVATIONS:
        return f"activation {moe.activation.value!r} of experts is not supported, only {', '.join(ACTIVATIONS)}"
    if moe.is_lora_enabled:
        return "LoRA on a model with quantized experts is not supported"
    swiglu = (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)
    for what, present in (
        ("a bias", moe.has_bias),
        ("a limit, alpha or beta in the activation", any(value is not None for value in swiglu)),
        ("a routing weight on the input", layer.apply_router_weight_on_input),
    ):
        if present:
            return f"experts with {what} are not supported"
    return None
