"""Attention in groups: every backend equals masked attention over all rows, forward and every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernelgraft_core.point_attention import TAILS, Groups, cut, grouped_attention, grouped_self_attention
from kernelgraft_core.point_attention.attention import examples
from kernelgraft_core.point_attention.attention.ops import ATTENTION, GRAD, SELF_ATTENTION
from kernelgraft_core.runtime.testing import assert_close, poison_empty

RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("x", "position", "in_weight", "in_bias", "out_weight", "out_bias")


@pytest.fixture(params=["cpu", "torch", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def some_groups(counts, size, tail="balanced", seed=0):
    rows = sum(counts)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return cut(order, bounds, size, tail)


def mask_of(groups):
    """float64 ``(N, N)``: 0 where a row attends to another, log n where it does so n times, else -inf."""
    times = torch.zeros(groups.rows, groups.rows, dtype=torch.float64)
    bounds = groups.starts.tolist()
    for first, last, own in zip(bounds, bounds[1:], groups.owned.tolist(), strict=False):
        members = groups.members[first:last].long()
        times[members[:own]] = members.bincount(minlength=groups.rows).double()
    return times.log()


def dense(qkv, groups, heads):
    """Attention of all rows to all rows, masked."""
    query, key, value = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    scores = query @ key.mT / math.sqrt(query.shape[2]) + mask_of(groups)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def dense_self_attention(x, position, in_weight, in_bias, out_weight, out_bias, groups, heads):
    moved = x if position is None else x + position
    parts = [F.linear(m, w, b) for m, w, b in zip((moved, moved, x), in_weight.chunk(3), in_bias.chunk(3), strict=True)]
    return F.linear(dense(torch.cat(parts, 1), groups, heads), out_weight, out_bias)


def operands(rows, channels, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (rows, channels),
        (rows, channels),
        (3 * channels, channels),
        (3 * channels,),
        (channels, channels),
        (channels,),
    )
    scales = 1, 1, channels**-0.5, 1, channels**-0.5, 1
    return [torch.randn(s, generator=generator).mul(f).to(dtype) for s, f in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("dtype", RATIO, ids=["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("counts", "size", "channels", "heads"),
    [([1], 69, 16, 1), ([40, 0, 25, 3], 17, 128, 8), ([100], 144, 82, 2), ([23, 30], 8, 24, 3), ([9], 4, 41, 1),
     ([200], 70, 32, 4)],
    ids=str,
)  # fmt: skip
def test_is_masked_attention(counts, size, channels, heads, tail, dtype, backend):
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("the reference's")
    groups = some_groups(counts, size, tail)
    leaves = [each.requires_grad_() for each in operands(groups.rows, channels, dtype)]
    grad = torch.randn(groups.rows, channels).to(dtype)
    with poison_empty():
        out = grouped_self_attention(*leaves, groups, heads)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = dense_self_attention(*exact, groups, heads)
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    assert out.dtype == dtype
    for name, right, value in zip(("y", *NAMES), [wanted.detach(), *gradients], found, strict=True):
        # With one row only, attention does not depend on queries and keys: those gradients are 0 and have no scale.
        if name == "position" and groups.rows == 1:
            assert value.abs().max() < 0.1
            continue
        assert_close(name, right, value, RATIO[dtype])


@pytest.mark.parametrize("dtype", RATIO, ids=["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("size", "channels", "heads"), [(69, 128, 8), (5, 24, 3), (16, 82, 2), (33, 129, 1)], ids=str)
def test_of_queries_keys_and_values(size, channels, heads, tail, dtype, backend):
    if backend == "cpu" and (dtype == torch.float64 or channels // heads > 128):
        pytest.skip("the reference's")
    groups = some_groups([50, 3, 60], size, tail)
    qkv = torch.randn(groups.rows, 3 * channels).to(dtype).requires_grad_()
    grad = torch.randn(groups.rows, channels).to(dtype)
    with poison_empty():
        out = grouped_attention(qkv, groups, heads)
        (found,) = torch.autograd.grad(out, qkv, grad)
    exact = qkv.detach().double().requires_grad_()
    wanted = dense(exact, groups, heads)
    assert_close("y", wanted.detach(), out.detach(), RATIO[dtype])
    assert_close("qkv", torch.autograd.grad(wanted, exact, grad.double())[0], found, RATIO[dtype])


@pytest.mark.parametrize("known", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize(("size", "channels", "heads"), [(69, 128, 8), (7, 41, 1)], ids=str)
def test_every_instruction_set(size, channels, heads, known, monkeypatch):
    pytest.importorskip("numba")
    from kernelgraft_core.point_attention.attention import cpu
    from kernelgraft_core.point_attention.cpu_tile import TILE_SETS
    from kernelgraft_core.runtime.cpu_vectors import is_there

    tiles = next(each for each in TILE_SETS if each.isa.name == known)
    if not is_there(tiles.isa):
        pytest.skip(f"{known} is not there")
    monkeypatch.setattr(cpu, "float_set", lambda: tiles)
    monkeypatch.setattr(cpu, "set_for", lambda dtype: tiles)
    groups = some_groups([150, 9], size, "parity")
    tensors = operands(groups.rows, channels)
    found = cpu.grouped_self_attention(*tensors, *groups.tensors, heads, groups.size)
    wanted = dense_self_attention(*(each.double() for each in tensors), groups, heads)
    assert_close("y", wanted, found, 2e-6)


def test_without_position_and_biases(backend):
    groups = some_groups([30, 20], 12)
    x, _, in_weight, _, out_weight, _ = (each.requires_grad_() for each in operands(50, 32))
    out = grouped_self_attention(x, None, in_weight, None, out_weight, None, groups, 2)
    zeros = torch.zeros(96, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    exact = [each.detach().double().requires_grad_() for each in (x, in_weight, out_weight)]
    wanted = dense_self_attention(exact[0], None, exact[1], zeros[0], exact[2], zeros[1], groups, 2)
    assert_close("y", wanted.detach(), out.detach(), 2e-6)
    found = torch.autograd.grad(out.sum(), (x, in_weight, out_weight))
    for name, right, value in zip("xio", torch.autograd.grad(wanted.sum(), exact), found, strict=True):
        assert_close(name, right, value, 2e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_are_right(tail):
    groups = some_groups([5, 2], 3, tail)
    leaves = [each.double().requires_grad_() for each in operands(7, 4)]
    assert torch.autograd.gradcheck(lambda *tensors: grouped_self_attention(*tensors, groups, 2), leaves)


def test_scores_may_be_large(backend):
    groups = some_groups([64], 32)
    qkv = 60 * torch.randn(64, 96)
    assert_close("y", dense(qkv.double(), groups, 2), grouped_attention(qkv, groups, 2), 1e-4)


def test_rows_that_are_no_numbers_stay_in_their_groups(backend):
    groups = some_groups([40], 10)
    qkv = torch.randn(40, 48)
    qkv[groups.members[3].long()] = math.nan
    out = grouped_attention(qkv, groups, 2)
    there = groups.members.long()
    assert out[there[:10]].isnan().all()
    assert out[there[10:]].isfinite().all()


def test_rows_of_any_layout(backend):
    groups = some_groups([40], 11)
    x, position, in_weight, in_bias, out_weight, out_bias = operands(40, 32)
    wide, turned = torch.randn(40, 64), in_weight.T.contiguous().T
    wide[:, ::2] = x
    found = grouped_self_attention(wide[:, ::2], position, turned, in_bias, out_weight, out_bias, groups, 2)
    wanted = grouped_self_attention(x, position, in_weight, in_bias, out_weight, out_bias, groups, 2)
    torch.testing.assert_close(found, wanted)


def test_no_rows(backend):
    groups = some_groups([0, 0], 8)
    leaves = [each.requires_grad_() for each in operands(0, 32)]
    out = grouped_self_attention(*leaves, groups, 2)
    assert out.shape == (0, 32)
    out.sum().backward()
    assert all(leaf.grad.eq(0).all() for leaf in leaves)
    assert grouped_attention(torch.zeros(0, 96), groups, 2).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_and_company_do_not_change_the_result(dtype, monkeypatch):
    pytest.importorskip("numba")
    both, one = some_groups([300, 200], 69), some_groups([300], 69, seed=1)
    order = torch.cat((one.members.long(), torch.arange(300, 500)))
    both = cut(order, torch.tensor([0, 300, 500]), 69)
    tensors = operands(500, 128, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(grouped_self_attention(*tensors, both, 8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = grouped_self_attention(tensors[0][:300], tensors[1][:300], *tensors[2:], one, 8)
    assert torch.equal(alone, found[0][:300])


def test_a_changed_weight_is_seen():
    pytest.importorskip("numba")
    groups, tensors = some_groups([30], 10), operands(30, 32)
    before = grouped_self_attention(*tensors, groups, 2)
    with torch.no_grad():
        tensors[4].mul_(2)
        tensors[5].mul_(2)
    torch.testing.assert_close(grouped_self_attention(*tensors, groups, 2), 2 * before)


def test_they_are_sound_ops():
    groups = some_groups([9, 5], 6, "parity")
    leaves = [each.requires_grad_() for each in operands(14, 8)]
    qkv = torch.randn(14, 24, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ATTENTION._overload, (qkv, *groups.tensors, 2, groups.size), test_utils=tests)
    torch.library.opcheck(SELF_ATTENTION._overload, (*leaves, *groups.tensors, 2, groups.size), test_utils=tests)
    with torch.no_grad():
        torch.library.opcheck(
            GRAD._overload, (torch.randn(14, 8), qkv.detach(), *groups.tensors, 2, groups.size),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_autocast_converts_what_is_multiplied():
    groups, leaves = some_groups([30], 10), [each.requires_grad_() for each in operands(30, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_self_attention(*leaves, groups, 2)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves)


def test_examples_run_on_every_backend_there_is():
    found = examples.example_args("cpu", dtype=torch.float32)
    assert set(found) == {op.name for op in (ATTENTION, GRAD, SELF_ATTENTION)}
    for op in (ATTENTION, GRAD, SELF_ATTENTION):
        assert op(*found[op.name]).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x is torch\.float32 \(4,\)"),
        ({"x": torch.zeros(4, 6).long()}, r"x is torch\.int64"),
        ({"position": torch.zeros(3, 6)}, r"position is \(3, 6\), expected \(4, 6\)"),
        ({"in_weight": torch.zeros(6, 6)}, r"in_weight is \(6, 6\), expected \(18, 6\)"),
        ({"in_bias": torch.zeros(6)}, r"in_bias is \(6,\)"),
        ({"out_weight": torch.zeros(6, 6).double()}, r"out_weight is torch\.float64 on cpu, x torch\.float32"),
        ({"heads": 4}, "6 channels do not split into 4 heads"),
        ({"heads": 0}, "6 channels do not split into 0 heads"),
        ({"groups": some_groups([5], 2)}, "the groups are of 5 rows, there are 4"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = dict(zip(NAMES, operands(4, 6), strict=True)) | {"groups": some_groups([4], 2), "heads": 2}
    assert grouped_self_attention(**right).shape == (4, 6)
    with pytest.raises(ValueError, match=message):
        grouped_self_attention(**right | change)


@pytest.mark.parametrize(
    ("members", "starts", "owned", "message"),
    [
        ([0, 1, 2, 4], [0, 2, 4], [2, 2], "members of the groups go from 0 to 4, expected 0 to 3"),
        ([0, 1, 2, 3], [0, 2, 5], [2, 2], "starts of the groups do not ascend from 0 to at most 4"),
        ([0, 1, 2, 3], [0, 3, 2], [2, 2], "starts of the groups do not ascend"),
        ([0, 1, 2, 3], [0, 2, 4], [3, 1], "owns more members than it has"),
        ([0, 1, 2, 3], [0, 1, 4], [1, 3], "or has more than 2"),
        ([0, 1, 2, 3], [0, 2, 4], [2, 1], "row 3 is owned by 0 groups, expected 1"),
        ([0, 1, 1, 3], [0, 2, 4], [2, 2], "row 1 is owned by 2 groups, expected 1"),
        ([0, 1, 2, 3], [0, 2], [2, 2], "the groups have 2 starts for 2 groups"),
    ],
)
def test_groups_that_kernels_cannot_trust_are_refused(members, starts, owned, message):
    tensors = (torch.tensor(each, dtype=torch.int32) for each in (members, starts, owned))
    with pytest.raises(ValueError, match=message):
        grouped_attention(torch.zeros(4, 6), Groups(*tensors, rows=4, size=2), 1)


def test_groups_of_a_wrong_type_are_refused():
    groups = some_groups([4], 2)
    with pytest.raises(ValueError, match=r"members of the groups is torch\.int64 \(4,\)"):
        grouped_attention(torch.zeros(4, 6), Groups(groups.members.long(), groups.starts, groups.owned, 4, 2), 1)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_what_is_not_finite_stays_in_its_group(monkeypatch, backend):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", backend)
    groups = Groups(torch.arange(10).int(), torch.tensor([0, 4, 10]).int(), torch.tensor([4, 6]).int(), 10, 6)
    qkv = torch.randn(10, 96)
    clean = qkv.clone()
    qkv[4:] = torch.nan
    results = []
    for values in (qkv, clean):
        values.requires_grad_()
        out = grouped_attention(values, groups, 2)
        out[:4].square().sum().backward()
        results.append((out[:4].detach(), values.grad[:4]))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_group_that_owns_nothing_gives_nothing(monkeypatch, backend):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", backend)
    qkv = torch.randn(300, 96, requires_grad=True)  # leaves something behind in the memory that is used again
    whole = Groups(torch.arange(300).int(), torch.tensor([0, 150, 300]).int(), torch.tensor([150, 150]).int(), 300, 150)
    grouped_attention(qkv, whole, 2).square().sum().backward()
    starts, owned = torch.tensor([0, 3, 5]).int(), torch.tensor([3, 0]).int()
    few, alone = (torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    grouped_attention(few, Groups(torch.tensor([0, 1, 2, 0, 1]).int(), starts, owned, 3, 3), 2).sum().backward()
    one = Groups(torch.arange(3).int(), starts[:2], owned[:1], 3, 3)
    grouped_attention(alone, one, 2).sum().backward()
    torch.testing.assert_close(few.grad, alone.grad)
