"""From the ``quantization_config`` of a checkpoint to the layout of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernelgraft_core.runtime.errors import CheckpointError

from .autoawq import Gemm, Gemv
from .compressed_tensors import PackQuantized
from .layout import Layout, StoredTensor
from .llm_awq import LlmAwq
from .native import FORMAT_VERSION, Native
from .qoq import FORMAT_VERSION as QOQ_VERSION
from .qoq import Qoq
from .qserve import GROUP as QSERVE_GROUP
from .qserve import QServe

TARGETS: dict[str, type[Layout]] = {
    "awq": Gemm,
    "compressed-tensors": PackQuantized,
    "kernelgraft": Native,
    "qoq": Qoq,
    "qserve": QServe,
}
"""The formats that are written, by the name that the command line gives them."""


def find_layout(config: Mapping[str, Any], stored: Mapping[str, StoredTensor] | None = None) -> Layout:
    """The layout of a checkpoint.

    Args:
        config: its ``quantization_config``, or the ``quant_config.json`` of old AutoAWQ checkpoints. QServe has none:
            for its checkpoints ``quant_method`` is ``"qserve"``, ``group_size`` what is known of it, and ``s2_order``
            as in :class:`~kernelgraft_core.quant.formats.qserve.QServe`.
        stored: its tensors by full name, where they are known. llm-awq has had three layouts under one name; the
            tensors tell which. Without them it is the latest.

    Raises:
        CheckpointError: the method is none of ours, or a setting is one that is not read; the message names it.
    """
    method = config.get("quant_method", "awq" if "w_bit" in config else None)
    if method not in _READERS:
        known = ", ".join(map(repr, _READERS))
        raise CheckpointError(f"quantization_config has quant_method = {method!r}; known are {known}")
    try:
        return _READERS[method](config, stored or {})
    except ValueError as error:
        raise CheckpointError(f"quantization_config has {error}") from None


def _awq(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Layout:
    bits = config.get("bits", config.get("w_bit", 4))
    size = config.get("group_size", config.get("q_group_size", 128))
    if config.get("zero_point", True) is not True:
        raise ValueError(f"zero_point = {config['zero_point']!r}, expected True")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    if version in ("gemv_fast", "llm-awq"):
        return _llm_awq(bits, size, stored)
    if version not in ("gemm", "gemv"):
        raise ValueError(f"version = {config.get('version')!r}, expected gemm, gemv, gemv_fast or llm-awq")
    return Gemm(bits, size) if version == "gemm" else Gemv(bits, size)


def _llm_awq(bits: int, size: int, stored: Mapping[str, StoredTensor]) -> Layout:
    packed = next((name for name in sorted(stored) if name.endswith(".qweight")), None)
    if packed is None:
        return LlmAwq(bits, size)
    layer = packed.removesuffix(".qweight")
    offsets = stored.get(f"{layer}.qzeros")
    if stored[packed].dtype != torch.int32:
        # GPTQModel's own GEMV_FAST layers call the offsets qzeros.
        return LlmAwq(bits, size, offsets="qzeros" if offsets else "scaled_zeros")
    scales = stored.get(f"{layer}.scales")
    rows = stored[packed].shape[0]
    return Gemv(bits, size) if scales is not None and scales.shape[:1] == (rows,) else Gemm(bits, size)


def _compressed_tensors(config: Mapping[str, Any], _: Mapping[str, StoredTensor]) -> Layout:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"config_groups = {groups!r}, expected at least one group")
    if config.get("kv_cache_scheme") is not None:
        raise ValueError("a kv_cache_scheme, which no other format holds")
    layouts = {name: _scheme(name, group, config.get("format")) for name, group in groups.items()}
    first, *others = layouts.values()
    if any(other != first for other in others):
        raise ValueError(f"config_groups that differ: {', '.join(layouts)}")
    return first


def _scheme(name: str, group: Any, file_format: Any) -> PackQuantized:
    """One of the ``config_groups``, which may be of another kind than 4-bit weights."""
    if not isinstance(group, Mapping) or not isinstance(weights := group.get("weights"), Mapping):
        raise ValueError(f"no weights in config_groups.{name}")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise ValueError(f"{key} in config_groups.{name}; only weights may be quantized")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    for key, value, wanted in (
        ("format", group.get("format") or file_format, ("pack-quantized",)),
        ("type", weights.get("type", "int"), ("int",)),
        ("dynamic", weights.get("dynamic", False), (False,)),
        ("strategy", strategy, ("group", "channel")),
        ("actorder", weights.get("actorder"), (None, False, "weight", "static")),
    ):
        if value not in wanted:
            expected = " or ".join(repr(w) for w in wanted)
            raise ValueError(f"{key} = {value!r} in config_groups.{name}, expected {expected}")
    size: Any = weights.get("group_size") if strategy == "group" else -1
    return PackQuantized(weights.get("num_bits", 8), size, bool(weights.get("symmetric", True)))


def _native(config: Mapping[str, Any], _: Mapping[str, StoredTensor]) -> Layout:
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"format_version = {config.get('format_version')!r}, expected {FORMAT_VERSION}")
    symmetric = config.get("symmetric", False)
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric = {symmetric!r}, expected true or false")
    return Native(config.get("bits", 4), config.get("group_size", 128), symmetric)


def _qoq(config: Mapping[str, Any], _: Mapping[str, StoredTensor]) -> Layout:
    if config.get("format_version") != QOQ_VERSION:
        raise ValueError(f"format_version = {config.get('format_version')!r}, expected {QOQ_VERSION}")
    if config.get("act_bits", 8) != 8:
        raise ValueError(f"act_bits = {config['act_bits']!r}, expected 8")
    kv = config.get("kv") or {}
    if not isinstance(kv, Mapping) or not kv.keys() <= {"bits", "smooth"}:
        raise ValueError(f"kv = {kv!r}, expected bits and smooth")
    return Qoq(
        config.get("bits", 4),
        config.get("group_size", 128),
        zero_form=config.get("zero", "pre"),
        kv_bits=kv.get("bits"),
        kv_smooth=kv.get("smooth", False),
    )


def _qserve(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Layout:
    size: Any = config.get("group_size")
    if size is None:
        # Whether there are groups is to be seen; how large they are, in the shapes that are checked later on.
        size = QSERVE_GROUP if any(name.endswith(".s2_scales") for name in stored) else -1
    return QServe(config.get("bits", 4), size, s2_order=config.get("s2_order", "qserve"))


_READERS = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "kernelgraft_awq": _native,
    "qoq": _qoq,
    "qserve": _qserve,
}
