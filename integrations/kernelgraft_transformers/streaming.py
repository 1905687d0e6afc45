"""A model of which one block at a time is in memory, read from its safetensors files when it is its turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft_core.quant.architectures import Architecture, find_architecture
from kernelgraft_core.quant.outcome import TensorChange
from kernelgraft_core.quant.runner import check_layers
from kernelgraft_core.runtime.errors import CheckpointError

from .quiet import quiet
from .shards import ShardReader, list_shards

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight$")
_EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class StreamedModel:
    """The skeleton of a model: float32 embeddings, and whatever else comes before the blocks, in memory.

    The blocks' parameters are on the meta device; :meth:`open` brings one in. The output head is never read.

    Args:
        directory: of a model that is not quantized, in safetensors.
        device: what computes.
        group_size: of the scheme, to refuse layers that it does not divide.

    Raises:
        UnsupportedModelError: no adapter knows the model.
        CheckpointError: a file is truncated or missing, or a tensor is missing from them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device,
        group_size: int,
        place: Callable[[int], torch.device] | None = None,
    ) -> None:
        self._device, self._group_size = device, group_size
        self._place = place or (lambda _: device)
        self.model = empty_model(directory)
        self.architecture: Architecture = find_architecture(self.model)
        self.architecture.check(self.model)
        self._path = self.architecture.block_path(self.model)
        self._list = self.architecture.block_list(self.model)
        self.reader = ShardReader(list_shards(directory))
        self._stored = self._find_stored_names()
        self._load_around_blocks()

    @property
    def count(self) -> int:
        return len(self._list)

    def path(self, index: int) -> str:
        return f"{self._path}.{index}"

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` in float32 on its device; it is gone afterwards."""
        self._load(self._stored_in_block(index))
        block = self._list[index]
        try:
            if absent := [name for name, p in block.named_parameters() if p.device.type == "meta"]:
                raise CheckpointError(f"the files hold no {self.path(index)}.{absent[0]}")
            self.architecture.prepare(block)
            block.to(self._place(index)).requires_grad_(False).eval()
            check_layers(self.architecture, block, self.path(index), self._group_size)
            yield block
        finally:
            self._list[index] = nn.Module()  # lets go of the weights

    def stored_name(self, layer: str) -> str:
        """What the files call a layer that the model calls ``layer``: its name without ``.weight``."""
        return self._stored.get(f"{layer}.weight", f"{layer}.weight").removesuffix(".weight")

    def stored_parameter(self, name: str) -> str:
        return self._stored.get(name, name)

    def stored_embeddings(self) -> str:
        """What the files call the embeddings' tensor."""
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        return self.stored_parameter(f"{name}.weight")

    def change(self, changes: Mapping[str, TensorChange], dtype: torch.dtype) -> None:
        """Change tensors around the blocks, by the model's names; the output head, which is not in memory, apart.

        They are rounded to ``dtype``, what the checkpoint will hold them in: blocks are calibrated on that.
        """
        for name in changes.keys() - self._head_names():
            parameter = self.model.get_parameter(name)
            parameter.data = changes[name](parameter.data).to(dtype).float()

    def names_outside_blocks(self) -> list[str]:
        """The tensors in the files that no block holds."""
        inside = {stored for index in range(self.count) for stored in self._stored_in_block(index)}
        return [name for name in self.reader.names() if name not in inside]

    def unquantized_modules(self) -> list[str]:
        """What ``modules_to_not_convert`` has to name: linear layers that stay as they are, the output head apart.

        Call it while no block has been opened.
        """
        kept: list[str] = []
        for index, block in enumerate(self._list):
            groups = self.architecture.scale_groups(block)
            targets = {name for group in groups for name in group.targets}
            linear = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)} - targets
            kept += [f"{self.path(index)}.{name}" for name in sorted(linear.union(*(g.followers for g in groups)))]
        around = [(name, m) for name, m in self.model.named_modules() if name and not self._is_near_blocks(name)]
        outer: list[str] = []
        for name, module in around:
            if any(name.startswith(f"{known}.") for known in outer) or module is self.model.get_output_embeddings():
                continue
            if any(isinstance(part, nn.Linear) for part in module.modules()):
                outer.append(name)
        return outer + kept

    def _is_near_blocks(self, name: str) -> bool:
        """Whether a module holds the blocks or lies in one."""
        return f"{self._path}.".startswith(f"{name}.") or name.startswith(f"{self._path}.")

    def _stored_in_block(self, index: int) -> set[str]:
        prefix = f"{self.path(index)}."
        return {stored for name, stored in self._stored.items() if name.startswith(prefix)}

    def _find_stored_names(self) -> dict[str, str]:
        """What the files call each tensor, by what the model calls it; experts by themselves, as after unfusing."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        parameters = self.model.state_dict()
        names: dict[str, str] = {}
        for stored in self.reader.names():
            name, pattern = rename_source_key(stored, renamings, converters, self.model.base_model_prefix, parameters)
            if name not in parameters and stored in parameters:
                name, pattern = stored, None
            expert = _EXPERT.match(stored)
            if pattern is not None and expert:
                part = _EXPERT_PARTS.get(expert["part"], expert["part"])
                name = f"{name.rpartition('.')[0]}.{expert['index']}.{part}.weight"
            names[name] = stored
        return names

    def _head_names(self) -> set[str]:
        """What the model calls the tensors of its output head."""
        head = self.model.get_output_embeddings()
        return {f"{name}.{part}" for name, m in self.model.named_modules() if m is head for part in ("weight", "bias")}

    def _load_around_blocks(self) -> None:
        heads = self._head_names()
        blocks = f"{self._path}."
        self._load({stored for name, stored in self._stored.items() if name not in heads and blocks not in f"{name}."})
        for name, parameter in self.model.named_parameters():
            if parameter.device.type == "meta" and not name.startswith(blocks) and name not in heads:
                raise CheckpointError(f"the files hold no {name}")
        for name, module in self.model.named_modules():
            if name and not self._is_near_blocks(name) and not any(p.is_meta for p in module.parameters()):
                module.to(self._device)
        self.model.requires_grad_(False).eval()

    def _load(self, stored: set[str]) -> None:
        """Read tensors into the model, through Transformers' own renaming and merging."""
        import copy

        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=copy.deepcopy(self._mapping))
        with quiet(), self.reader.slices(stored) as pieces:
            convert_and_load_state_dict_in_model(self.model, pieces, config)


def empty_model(directory: Path) -> Any:
    """The model of a directory in float32, its parameters on the meta device, its buffers real.

    Raises:
        OSError, ValueError: the config cannot be read, or Transformers has no such model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(directory)
    config.dtype = torch.float32
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False), quiet():
        return auto.from_config(config, dtype=torch.float32)
