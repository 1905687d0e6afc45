"""From a model directory or name to a quantized checkpoint, one block in memory at a time."""

from __future__ import annotations

import glob
import hashlib
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core import __version__
from kernelgraft_core.quant.architectures import find_architecture, linear_layer
from kernelgraft_core.quant.awq import AwqConfig, AwqMethod, awq_gptq_config, gptq_config, rtn_config
from kernelgraft_core.quant.formats.layout import Layout
from kernelgraft_core.quant.formats.qoq import Qoq
from kernelgraft_core.quant.outcome import BlockOutcome, Method
from kernelgraft_core.quant.qoq import QoqConfig, QoqMethod, qoq_config
from kernelgraft_core.quant.ranks import rank, world_size
from kernelgraft_core.quant.rounding import Scheme
from kernelgraft_core.quant.runner import BlockResult, as_arguments, quantize_blocks
from kernelgraft_core.quant.sequential import capture_block_calls
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .checkpoint import check_replaceable, replaced_directory
from .outputs import PACKED, choose_layout, write_checkpoint
from .streaming import StreamedModel, empty_model
from .texts import Calibration, encode
from .workspace import Workspace, workspace_of

log = logging.getLogger("kernelgraft")

AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize.

    Attributes:
        summary: one line for help texts.
        settings: the method's settings for a scheme.
        method: the method with those settings.
        group_size: what the recipe is for; None leaves it to the caller.
        layouts: formats that hold what it yields; the first is the default where it can hold the scheme.
    """

    name: str
    summary: str
    settings: Callable[[Scheme], Any]
    method: Callable[[Any], Method]
    group_size: int | None = None
    layouts: tuple[str, ...] = PACKED


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("awq", "activation-aware scales and grids", AwqConfig, AwqMethod),
        Recipe("awq+gptq", "scales and grids of awq, rounding of gptq", awq_gptq_config, AwqMethod),
        Recipe("gptq", "error-compensated rounding", gptq_config, AwqMethod),
        Recipe("qoq-g128", "W4A8KV4 in groups of 128", qoq_config, QoqMethod, 128, ("qoq",)),
        Recipe("qoq-g64", "W4A8KV4 in groups of 64", qoq_config, QoqMethod, 64, ("qoq",)),
        Recipe("qoq-chn", "W4A8KV4 per channel", qoq_config, QoqMethod, -1, ("qoq",)),
        Recipe("rtn", "plain rounding, to compare with", rtn_config, AwqMethod),
    )
}


@dataclass(frozen=True)
class SourceModel:
    """A model to quantize, not loaded.

    Attributes:
        name: as the user gave it.
        directory: where its files are.
        tokenizer: of the model.
        dtype: what tensors that are not quantized are stored in: as it was, or float16 for a float32 model.
    """

    name: str
    directory: Path
    tokenizer: Any
    dtype: torch.dtype


def load_source(name: str) -> SourceModel:
    """Find a directory or a hub name, and refuse what cannot be quantized. No weights are read.

    Raises:
        UnsupportedModelError: it is quantized already, or no adapter knows it; CheckpointError: a file is truncated;
        OSError: it cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    from .shards import ShardReader, list_shards

    config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        raise UnsupportedModelError(f"{name} is quantized already ({method}); quantize the original model")
    stored = config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.float16
    directory = Path(name) if Path(name).is_dir() else _download(name)
    model = empty_model(directory)
    find_architecture(model).check(model)
    ShardReader(list_shards(directory))
    return SourceModel(name, directory, AutoTokenizer.from_pretrained(name), stored)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def choose_group_size(model: nn.Module) -> int:
    """The largest of 128, 64 and 32 that divides K of every layer to be quantized.

    Raises:
        ValueError: none does.
    """
    widths = {layer.in_features for _, layer in _target_layers(model)}
    for size in AUTO_GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise ValueError(f"no group size of {AUTO_GROUP_SIZES} divides every K of the model: {sorted(widths)}")


def _target_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every layer that will be quantized, by name; the model may be on the meta device."""
    architecture = find_architecture(model)
    path = architecture.block_path(model)
    for index, block in enumerate(architecture.block_list(model)):
        architecture.prepare(block)
        for group in architecture.scale_groups(block):
            for name in group.targets:
                yield f"{path}.{index}.{name}", linear_layer(block, name)


def _group_size(recipe: Recipe, given: int | None, model: nn.Module) -> int:
    if recipe.group_size is None:
        return choose_group_size(model) if given is None else given
    if given not in (None, recipe.group_size):
        raise ValueError(f"recipe {recipe.name} is for group size {recipe.group_size}, not {given}")
    return recipe.group_size


def _with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    known = {part.name for part in fields(config)} - {"scheme"}
    if unknown := settings.keys() - known:
        raise ValueError(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return replace(config, **settings)


def _fit_qoq(layout: Qoq, config: QoqConfig) -> Qoq:
    """The layout with what the settings say of zero points and of the cache."""
    if config.weight_bits is None:
        raise ValueError("weight_bits=None rounds no weight: there is nothing that a checkpoint could hold")
    smooth = config.cache_bits is not None and config.smooth_attention > 0
    return replace(layout, zero_form=config.zero, kv_bits=config.cache_bits, kv_smooth=smooth)


def _check_fit(model: nn.Module, layout: Layout) -> None:
    """Refuse, before any work, layers that the layout cannot hold; the group size is looked at as well."""
    for name, layer in _target_layers(model):
        try:
            layout.parts(layer.out_features, layer.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def quantize_checkpoint(
    source: SourceModel,
    out: Path,
    text: str,
    *,
    text_name: str = "the calibration text",
    recipe: str = "awq",
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    layout: str | None = None,
    settings: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    overwrite: bool = False,
    on_block: Callable[[BlockResult], None] | None = None,
) -> dict[str, Any]:
    """Quantize a model and write a checkpoint to ``out``, whole or not at all.

    Blocks are read, quantized and stored one at a time, so that one block, the embeddings and the activations are all
    that has to fit into memory. What is done is kept beside ``out`` until the checkpoint is there: the same call goes
    on after a kill, and gives the same bytes. In a process group of :mod:`torch.distributed` every rank calibrates on
    samples of its own and rank 0 writes.

    Args:
        text: calibration text; ``text_name`` names it in messages.
        recipe: a key of :data:`RECIPES`.
        bits: 3 or 4.
        group_size: -1, or a divisor of every K; None chooses (:func:`choose_group_size`).
        symmetric: no zero points.
        layout: how layers are written, see :func:`~kernelgraft_transformers.outputs.choose_layout`.
        settings: of the recipe, in place of its own: attributes of its config.
        batches: keyword arguments of the model, in place of samples of the text: images, say.
        device: what computes.
        offload: read activations from disk each time they are used.
        on_block: called with each quantized block.

    Returns:
        The record that is stored beside the model and that ``kernelgraft inspect`` shows.

    Raises:
        ValueError: recipe, scheme, layout or text do not fit; FileExistsError: ``out`` is in the way; NonFiniteError: a
            layer holds NaN; BlockingIOError: another process is quantizing to ``out``. Nothing at ``out`` changes then.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(sorted(RECIPES))}")
    if out.exists() and source.directory.exists() and out.samefile(source.directory):
        raise ValueError(f"{out} is the model to be quantized; write to another directory")
    check_replaceable(out, overwrite=overwrite)
    calibration = calibration or Calibration()
    empty = empty_model(source.directory)
    size = _group_size(RECIPES[recipe], group_size, empty)
    scheme = Scheme(bits, size, symmetric)
    config = _with_settings(RECIPES[recipe].settings(scheme), settings or {})
    layout_name, written = choose_layout(layout, scheme, RECIPES[recipe].layouts)
    if isinstance(written, Qoq):
        written = _fit_qoq(written, config)
    _check_fit(empty, written)
    tokens = encode(source.tokenizer, text)
    digest = _digest(text, batches or ())
    if batches is None:
        batches = list(as_arguments(calibration.draw(tokens, text_name)))
    described = {
        "format": 1,
        "recipe": recipe,
        "kernelgraft": __version__,
        "source": source.name,
        "layout": layout_name,
        "bits": bits,
        "group_size": size,
        "symmetric": symmetric,
        "settings": {key: value for key, value in asdict(config).items() if key != "scheme"},
        "calibration": asdict(calibration) | {"text": text_name, "sha256": digest, "text_tokens": len(tokens)},
    }
    job = described | {"files": _fingerprint(source.directory), "ranks": world_size(), "dtype": str(source.dtype)}
    started = time.perf_counter()
    run = _Run(source, scheme, RECIPES[recipe].method(config), written, torch.device(device))
    with Workspace(workspace_of(out), job, on_disk=offload) as workspace:
        run.blocks(workspace, batches[rank() :: world_size()], on_block)
        notes = [workspace.notes(index) for index in range(run.model.count)] if rank() == 0 else []
        record = described | {
            "seconds": round(time.perf_counter() - started, 1),
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            },
            "layers": [layer for note in notes for layer in note["layers"]],
            "searches": [search for note in notes for search in note["searches"]],
        }
        if rank() == 0:
            with replaced_directory(out, overwrite=overwrite) as directory:
                files = [workspace.block_file(index) for index in range(run.model.count)]
                write_checkpoint(directory, run.model, files, source, written, run.unquantized, record, run.changes)
            _delete_leftovers(out)
        workspace.remove()
    return record


class _Run:
    """One quantization: the streamed model and what is made of its blocks."""

    def __init__(
        self, source: SourceModel, scheme: Scheme, method: Method, layout: Layout, device: torch.device
    ) -> None:
        self._source, self._method, self._layout = source, method, layout
        self.model = StreamedModel(source.directory, device=device, group_size=scheme.group_size)
        self.unquantized = self.model.unquantized_modules()
        with torch.no_grad():
            self.changes = method.around(self.model.architecture, self.model.model)
            self.model.change(self.changes, source.dtype)

    def blocks(
        self,
        workspace: Workspace,
        batches: Sequence[Mapping[str, Tensor]],
        on_block: Callable[[BlockResult], None] | None,
    ) -> None:
        model = self.model
        with torch.no_grad():
            calls = capture_block_calls(
                model.model, list(model.architecture.block_list(model.model)), self._on_device(batches)
            )
            if not calls.first:
                raise ValueError(f"rank {rank()} of {world_size()} has no calibration samples; take more of them")
            start, hidden = workspace.resume() or (0, None)
            if start:
                log.warning("going on at block %d of %d, where an earlier run stopped", start + 1, model.count)

            def finished(index: int, block: nn.Module, outcome: BlockOutcome) -> None:
                tensors = self._stored_tensors(model.path(index), block, outcome)
                notes = {
                    "layers": [asdict(report) for report in outcome.reports],
                    "searches": [asdict(search) for search in outcome.searches],
                }
                workspace.save_block(index, tensors, notes)
                calls.first.clear()  # the workspace holds them

            for result in quantize_blocks(
                model.architecture, model, calls, self._method, workspace, start=start, hidden=hidden, finished=finished
            ):
                if on_block is not None:
                    on_block(result)

    def _on_device(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        device = self.model.model.get_input_embeddings().weight.device
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    def _stored_tensors(self, path: str, block: nn.Module, outcome: BlockOutcome) -> dict[str, Tensor]:
        """All that the checkpoint holds of a block, under the names of the source's files.

        What is stored in 16 bits is rounded in the block too, so that the next one sees what will be loaded.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in outcome.weights.items():
            packed = self._layout.write(weight)
            tensors |= {f"{self.model.stored_name(name)}.{part}": t.cpu() for part, t in packed.items()}
        quantized = {f"{name}.weight" for name in outcome.weights}
        for name, tensor in block.state_dict().items():
            full = f"{path}.{name}"
            if full in quantized:
                continue
            if tensor.is_floating_point():
                rounded = tensor.to(self._source.dtype)
                tensor.copy_(rounded)
                tensor = rounded
            module, _, part = full.rpartition(".")
            stored = f"{self.model.stored_name(module)}.{part}" if f"{module}.weight" in quantized else full
            tensors[self.model.stored_parameter(stored)] = tensor.cpu()
        return tensors


def _delete_leftovers(out: Path) -> None:
    """What runs that were killed while they wrote or replaced ``out`` left beside it."""
    for kind in ("partial", "old"):
        for stale in out.parent.glob(f".{glob.escape(out.name)}.*.{kind}"):
            shutil.rmtree(stale, ignore_errors=True)


def _fingerprint(directory: Path) -> list[Any]:
    """Tells whether the source's files are the same as before, without reading them."""
    files = sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".json"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(text: str, batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Of the text, and of the samples where they were given instead of drawn from it."""
    digest = hashlib.sha256(text.encode())
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()
