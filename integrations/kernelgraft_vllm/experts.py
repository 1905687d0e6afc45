"""The experts of a mixture inside vLLM: loaded one by one in the checkpoint's layout, run in the kernels', on CPU."""

from __future__ import annotations

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

from .loaders import checked, on_each
from .routed_experts import ACTIVATIONS, routed_experts

_STEMS = ("w13", "w2")  # vLLM's names: gates and ups of all experts in one, downs in the other


class KernelgraftExpertsMethod(FusedMoEMethodBase):
    """Parameters, repacking and forward of the experts of one layer.

    Args:
        layer: of vLLM, empty.
        layout: how the checkpoint stores one projection of one expert.
        k_first: whether its tensors have K, or its groups, in the first dimension.
        prefix: name of the layer, for messages.

    Raises:
        NotImplementedError: the layer computes something else than a gated MLP per expert, or not on one CPU or
            tensor-parallel CPUs; the message says what.
    """

    def __init__(self, layer: Any, layout: Layout, k_first: bool, prefix: str) -> None:
        super().__init__(layer.moe_config)
        if reason := _why_not(layer, self.moe):
            raise NotImplementedError(f"{prefix}: {reason}")
        self.layout = layout
        self.k_first = k_first
        self.prefix = prefix
        self._local: dict[str, Layout] = {}
        self._missing: set[tuple[str, str, int]] = set()
        self._expected = 0

    def create_weights(
        self,
        layer: Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the empty tensors of this rank's shard, named ``w13_qweight`` and so on; scales are float16 as in files.

        Raises:
            ValueError: the layout cannot hold this rank's share of a projection.
        """
        ranks = self.moe.tp_size
        inner = intermediate_size_per_partition
        loader = extra_weight_attrs["weight_loader"]
        for stem, n, k, n_in_file, k_in_file in (
            ("w13", inner, hidden_size, inner * ranks, hidden_size),
            ("w2", hidden_size, inner, hidden_size, inner * ranks),
        ):
            # A group that spans all of K is shared by the ranks; any other belongs to one.
            shared = self.layout.group_size in (-1, k_in_file)
            local = self._local[stem] = replace(self.layout, group_size=-1) if shared else self.layout
            try:
                stored = self.layout.parts(n_in_file, k_in_file)
                local.parts(n, k)
            except ValueError as error:
                raise ValueError(f"{self.prefix}: {stem}{on_each(ranks)}: {error}") from None
            by_group = FusedMoeWeightScaleSupported.CHANNEL if shared else FusedMoeWeightScaleSupported.GROUP
            for name, part in local.parts(2 * n if stem == "w13" else n, k).items():
                parameter = Parameter(
                    torch.empty((num_experts, *part.shape), dtype=part.dtypes[0]), requires_grad=False
                )
                layer.register_parameter(f"{stem}_{name}", parameter)
                attributes = {
                    "weight_loader": self._loader(loader, name, stored[name]),
                    "is_transposed": self.k_first,
                    "quant_method": by_group.value,
                }
                set_weight_attrs(parameter, attributes)
            shards = ("w1", "w3") if stem == "w13" else ("w2",)
            self._missing |= {(name, shard, e) for name in stored for shard in shards for e in range(num_experts)}
        self._expected = len(self._missing)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace the loaded parameters by the stacked tensors of the kernels' weights.

        Raises:
            ValueError: an expert is missing, or a scale is NaN or infinite.
        """
        # None at all have come when vLLM fills the parameters itself, to measure.
        if self._missing and len(self._missing) < self._expected:
            name, shard, expert = min(self._missing)
            raise ValueError(
                f"{self.prefix}: {len(self._missing)} tensors of experts are not in the checkpoint, among them {name} "
                f"of {shard} of expert {expert}"
            )
        for stem in _STEMS:
            local = self._local[stem]
            stored = {name: layer.get_parameter(f"{stem}_{name}").data for name in self._names(stem, local, layer)}
            if not stored[local.scale].isfinite().all():
                raise ValueError(f"{self.prefix}: scales in the checkpoint are not all finite")
            try:
                experts = [
                    local.read({name: tensor[e] for name, tensor in stored.items()})
                    for e in range(len(stored[local.packed]))
                ]
            except ValueError as error:
                raise ValueError(f"{self.prefix}: {stem}: {error}") from None
            for name in stored:
                delattr(layer, f"{stem}_{name}")
            names = (*experts[0].planes, "scales", "zeros")
            for name, tensors in zip(names, zip(*(weight.tensors for weight in experts), strict=True), strict=True):
                layer.register_parameter(f"{stem}_{name}", Parameter(torch.stack(tensors), requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Module) -> None:
        """None: it describes tensors to vLLM's kernels."""

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
        gate_up, down = (self._tensors(layer, stem) for stem in _STEMS)
        out: Tensor = routed_experts(x, topk_weights, topk_ids, gate_up, down, layer.activation.value)
        return out
