"""What is measured: one :class:`Case` for each op, its shapes, our variants and the peers that people run today."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelgraft_core.quant.kv4 import kv4_append, kv4_attention, kv4_row_bytes, new_cache, unpack_rows
from kernelgraft_core.quant.packed.reference import dequantize
from kernelgraft_core.quant.weights import QuantizedWeight, linear, pack_weight
from kernelgraft_core.runtime.op import Implementation, Op, registered_ops
from kernelgraft_core.runtime.timing import rotated

Shape = Mapping[str, int]


class UnavailableError(RuntimeError):
    """A variant that a case must measure cannot run here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case's result.

    Attributes:
        run: computes it; rotates over copies of its operands where the case says so.
        ratio: largest relative RMS error against the case's reference, checked before anything is timed.
        backend: ``"cpu"``, ``"triton"`` or ``"torch"``.
        dtype: of the activations.
        weight_bytes: of one copy of the weight, None where there is none.
        context: what its runs happen in; entering it is not timed.
    """

    run: Callable[[], Tensor]
    ratio: float
    backend: str
    dtype: str
    weight_bytes: int | None = None
    context: Callable[[], AbstractContextManager[object]] | None = None


@dataclass(frozen=True)
class Prepared:
    """A case at one shape: the exact result in float64, and the variants by name."""

    reference: Tensor
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        suite: ``"cpu"``, ``"cuda"`` or ``"host"`` (the cost of Python around the kernels).
        peer: the variant that ratios are taken against.
        prepare: makes inputs for a shape; raises :class:`UnavailableError` where a variant cannot run.
        flops, bytes: floating-point operations and least memory traffic of one run.
        rotates: the operands are rotated beyond the last-level cache, as the layers of a model are.
    """

    name: str
    op: str
    suite: str
    peer: str
    shapes: tuple[Shape, ...]
    prepare: Callable[[Shape], Prepared]
    flops: Callable[[Shape], float] = field(default=lambda shape: 0.0)
    bytes: Callable[[Shape], float] = field(default=lambda shape: 0.0)
    rotates: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.suite == "cuda" else "cpu"


CASES: dict[tuple[str, str], Case] = {}


def register(case: Case) -> Case:
    """Add a case; names are unique in a suite.

    Raises:
        ValueError: the suite has a case of that name.
    """
    if (case.suite, case.name) in CASES:
        raise ValueError(f"suite {case.suite} has a case {case.name!r} already")
    CASES[case.suite, case.name] = case
    return case


def select(suite: str, names: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a suite, all of them without names.

    Raises:
        ValueError: an unknown suite or name; the message lists the known ones.
    """
    known = {name: case for (of, name), case in CASES.items() if of == suite}
    if unknown := [name for name in names if name not in known] or ([] if known else [suite]):
        raise ValueError(f"suite {suite} has no {', '.join(unknown)}; its cases are {', '.join(known) or 'none'}")
    return [known[name] for name in names or known]


def require_backend(op: str, backend: str, device: str, *args: object) -> None:
    """A benchmark of a backend must not silently measure another one.

    Raises:
        UnavailableError: another backend would run; the message gives each one's verdict.
    """
    try:
        verdicts = registered_ops()[op].explain(device, *args)
    except ImportError as error:
        raise UnavailableError(f"{op}: a backend cannot be imported: {error}") from error
    if verdicts.get(backend) != "runs":
        raise UnavailableError(f"{op}: backend {backend} does not run on {device}: {verdicts}")


# -- the cost of the router ------------------------------------------------------------------------------------------


def _add(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y)


_plain = Op("benchmark_add(Tensor x, Tensor y) -> Tensor", fake=lambda x, y: torch.empty_like(x))
_trained = Op(
    "benchmark_trained_add(Tensor x, Tensor y) -> Tensor",
    fake=lambda x, y: torch.empty_like(x),
    gradient=(lambda ctx, grad: (grad, grad), lambda ctx, inputs, output: None),
)
for _op in (_plain, _trained):
    _op.register(Implementation("reference", _add, ("cpu",), supports=lambda x, y: None))


def _prepare_overhead(shape: Shape) -> Prepared:
    x, y = torch.randn(shape["rows"], shape["columns"]), torch.randn(shape["rows"], shape["columns"])
    modes = {"grad mode": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    variants = {"direct call": Variant(lambda: _add(x, y), 1e-6, "torch", "float32")}
    for kind, op in (("op without gradient", _plain), ("op with gradient", _trained)):
        for mode, context in modes.items():
            run = functools.partial(op, x, y)
            variants[f"{kind}, {mode}"] = Variant(run, 1e-6, "reference", "float32", context=context)
    return Prepared(x.double() + y.double(), variants)


register(Case("op_overhead", "benchmark_add", "host", "direct call", ({"rows": 8, "columns": 64},), _prepare_overhead))

# -- W4A16 and W3A16 -------------------------------------------------------------------------------------------------

GROUP = 128
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def _packed_inputs(bits: int, shape: Shape, device: str) -> tuple[Tensor, QuantizedWeight, Tensor]:
    """Activations, weight, and the float64 weight that it stands for."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    levels = 1 << bits
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, levels, (n, k), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(levels // 4, 3 * levels // 4, (n, k // GROUP), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, k // GROUP, generator=generator) * 0.01 + 0.005
    weight = pack_weight(q, scales, zeros, bits)
    exact = dequantize(q, weight.scales, weight.zeros, torch.float64)
    return torch.randn(m, k, generator=generator), weight.to(device), exact


def _weight_bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _on(x: Tensor, weight: QuantizedWeight) -> Callable[..., Tensor]:
    """Multiply ``x`` with copies of a weight, given as their tensors."""
    return lambda *tensors: linear(x, type(weight)(*tensors))


def _prepare_packed_cpu(bits: int, shape: Shape) -> Prepared:
    x, weight, exact = _packed_inputs(bits, shape, "cpu")
    half = x.bfloat16()
    require_backend(f"w{bits}a16_linear", "cpu", "cpu", half, *weight.tensors, None)
    # aten's int4 kernel computes (q - 8) * s + z, with s and z in bfloat16, and takes groups of its own layout
    integers = weight.integers().int()
    aten = torch._convert_weight_to_int4pack_for_cpu(integers, 2)
    offsets = (8 - weight.zeros.float()) * weight.scales.float()
    affine = torch.stack((weight.scales.float(), offsets), dim=-1).transpose(0, 1).contiguous().bfloat16()
    single, rounded = exact.float(), exact.bfloat16()
    variants = {
        "kernelgraft": Variant(
            rotated(_on(half, weight), *weight.tensors), 0.01, "cpu", "bfloat16", _weight_bytes(*weight.tensors)
        ),
        "F.linear bf16": Variant(
            rotated(lambda w: F.linear(half, w), rounded), 0.01, "torch", "bfloat16", _weight_bytes(rounded)
        ),
        "F.linear fp32": Variant(
            rotated(lambda w: F.linear(x, w), single), 0.005, "torch", "float32", _weight_bytes(single)
        ),
        "aten int4pack bf16": Variant(
            rotated(lambda w, a: torch._weight_int4pack_mm_for_cpu(half, w, GROUP, a), aten, affine),
            0.02,
            "torch",
            "bfloat16",
            _weight_bytes(aten, affine),
        ),
    }
    if bits == 3:  # the same integers fit four bits as well
        wider = pack_weight(integers, weight.scales, weight.zeros, 4)
        variants["kernelgraft w4a16"] = Variant(
            rotated(_on(half, wider), *wider.tensors), 0.01, "cpu", "bfloat16", _weight_bytes(*wider.tensors)
        )
    # What bfloat16 activations lose is not the kernels' error: the reference takes them as they are.
    return Prepared(half.double() @ exact.T, variants)


def _prepare_packed_cuda(bits: int, shape: Shape) -> Prepared:
    if not torch.cuda.is_available():
        raise UnavailableError(f"w{bits}a16: no CUDA device")
    x, weight, exact = _packed_inputs(bits, shape, "cuda")
    half, rounded = x.half().cuda(), exact.half().cuda()
    require_backend(f"w{bits}a16_linear", "triton", "cuda", half, *weight.tensors, None)
    packed, dense = _weight_bytes(*weight.tensors), _weight_bytes(rounded)
    variants = {
        "kernelgraft": Variant(lambda: linear(half, weight), 0.005, "triton", "float16", packed),
        "cuBLAS fp16": Variant(lambda: F.linear(half, rounded), 0.005, "torch", "float16", dense),
    }
    if bits == 3:
        wider = pack_weight(weight.integers(), weight.scales, weight.zeros, 4)
        variants["kernelgraft w4a16"] = Variant(
            lambda: linear(half, wider), 0.005, "triton", "float16", _weight_bytes(*wider.tensors)
        )
    return Prepared(x.half().double() @ exact.T, variants)


def linear_flops(shape: Shape) -> float:
    return 2.0 * shape["m"] * shape["n"] * shape["k"]


def _packed_bytes(bits: int, shape: Shape) -> float:
    m, n, k = shape["m"], shape["n"], shape["k"]
    return n * k * bits / 8 + n * (k // GROUP) * 3 + 2 * m * (n + k)


_LAYERS = tuple({"m": m, "n": 4096, "k": 4096} for m in TOKENS)
for _bits in (4, 3):
    for _suite, _peer, _prepare in (
        ("cpu", "F.linear bf16", _prepare_packed_cpu),
        ("cuda", "cuBLAS fp16", _prepare_packed_cuda),
    ):
        register(
            Case(
                f"w{_bits}a16",
                f"w{_bits}a16_linear",
                _suite,
                _peer,
                _LAYERS,
                functools.partial(_prepare, _bits),
                linear_flops,
                functools.partial(_packed_bytes, _bits),
                rotates=_suite == "cpu",
            )
        )

# -- KV4 -------------------------------------------------------------------------------------------------------------

KV_HEADS, GROUP_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 4, 128, 16  # of an 8B Llama
CONTEXTS = tuple(
    {"batch": batch, "context": context} for batch, contexts in ((1, (1024, 4096, 16384)), (16, (1024, 4096)))
    for context in contexts
)  # fmt: skip


def _decode_inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """One query for each sequence, a cache, and what it stands for: ``(batch, heads, context, size)`` in float32."""
    batch, context = shape["batch"], shape["context"]
    generator = torch.Generator().manual_seed(0)
    blocks = context // BLOCK_SIZE
    tables = torch.randperm(batch * blocks, generator=generator).view(batch, blocks).int()
    cache = new_cache(batch * blocks, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    for begin in range(0, batch * context, context):
        key, value = torch.randn(2, context, KV_HEADS, HEAD_SIZE, generator=generator)
        kv4_append(key, value, cache, torch.arange(begin, begin + context))
    rows = cache[tables.long()].transpose(2, 3).flatten(1, 2).transpose(1, 2)
    key, value = unpack_rows(rows, torch.float32)
    query = torch.randn(batch, KV_HEADS * GROUP_HEADS, HEAD_SIZE, generator=generator).bfloat16()
    lengths, starts = torch.full((batch,), context).int(), torch.arange(batch + 1).int()
    return query.to(device), key, value, tuple(x.to(device) for x in (cache, tables, lengths, starts))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.unsqueeze(2), key, value, enable_gqa=True).squeeze(2)


def _attend_grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same, with the heads that share keys as queries of one head: keys are read once."""
    grouped = query.view(query.shape[0], KV_HEADS, GROUP_HEADS, HEAD_SIZE)
    return F.scaled_dot_product_attention(grouped, key, value).view(query.shape)


def _prepare_kv4(device: str, shape: Shape) -> Prepared:
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("kv4: no CUDA device")
    query, key, value, (cache, *rest) = _decode_inputs(shape, device)
    scale = HEAD_SIZE**-0.5
    backend = "triton" if device == "cuda" else "cpu"
    require_backend("kv4_attention", backend, device, query, None, None, cache, *rest, scale, True, None, None)
    exact = []  # one sequence after the other: a batch in float64 takes gigabytes
    for one, its_key, its_value in zip(query.cpu().double(), key, value, strict=True):
        weights = (one.view(KV_HEADS, GROUP_HEADS, HEAD_SIZE) @ its_key.double().mT * scale).softmax(-1)
        exact.append((weights @ its_value.double()).flatten(0, 1))
    turned = rotated if device == "cpu" else functools.partial  # on a GPU the timer flushes the cache
    dense = tuple(x.bfloat16().to(device) for x in (key, value))  # the peers' keys are the same numbers
    peers = {
        name: Variant(turned(functools.partial(run, query), *dense), 0.02, "torch", "bfloat16", _weight_bytes(*dense))
        for name, run in (("SDPA bf16", _attend), ("SDPA bf16, grouped", _attend_grouped))
    }
    ours = turned(lambda c: kv4_attention(query, None, None, c, *rest, scale), cache)
    variants = {"kernelgraft": Variant(ours, 0.02, backend, "bfloat16", cache.nbytes)} | peers
    return Prepared(torch.stack(exact), variants)


def _kv4_flops(shape: Shape) -> float:
    return 4.0 * shape["batch"] * shape["context"] * KV_HEADS * GROUP_HEADS * HEAD_SIZE


def _kv4_bytes(shape: Shape) -> float:
    return float(shape["batch"] * shape["context"] * KV_HEADS * kv4_row_bytes(HEAD_SIZE))


for _suite in ("cpu", "cuda"):
    register(
        Case(
            "kv4", "kv4_attention", _suite, "SDPA bf16, grouped", CONTEXTS, functools.partial(_prepare_kv4, _suite),
            _kv4_flops, _kv4_bytes, _suite == "cpu",
        )
    )  # fmt: skip
