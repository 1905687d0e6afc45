"""Sums over pixels: interpolation, their order and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.runtime.testing import assert_close, rng
from kernelgraft_core.vision.segments import segment_argmax
from kernelgraft_core.vision.taps import (
    Taps,
    bordered_corners,
    check_samples,
    gather,
    padded_corners,
    portions,
    regular,
    scatter,
)

from . import definitions

CORNERS = {"bordered": (bordered_corners, definitions.bordered), "padded": (padded_corners, definitions.padded)}
EDGES = [-1.5, -1.0, -0.75, 0.0, 0.25, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 1e9, -1e30, float("inf"), float("nan")]


@pytest.mark.parametrize("kind", CORNERS)
@pytest.mark.parametrize("size", [(1, 1), (4, 3), (1, 5)])
def test_interpolation_inside_at_the_edges_and_far_outside(kind, size):
    corners, definition = CORNERS[kind]
    maps = torch.randn(2, 3, *size, dtype=torch.double, generator=rng())
    y, x = (each.flatten() for each in torch.meshgrid(*[torch.tensor(EDGES, dtype=torch.double)] * 2, indexing="ij"))
    images = torch.arange(len(y)) % 2
    found = gather(maps, [regular(*corners(images, y, x, maps.shape))])
    wanted = torch.stack([definition(maps[n], float(a), float(b)) for n, a, b in zip(images, y, x, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CORNERS)
def test_gradients_of_maps_and_positions(kind):
    corners, _ = CORNERS[kind]
    maps = torch.randn(2, 3, 4, 5, dtype=torch.double, generator=rng()).requires_grad_()
    # Between pixels, where the derivative is continuous; some outside.
    y = (torch.tensor([0.3, 2.6, -0.4, 3.7, 1.2, 9.0], dtype=torch.double)).requires_grad_()
    x = (torch.tensor([1.7, -0.6, 4.3, 2.2, 4.8, 1.0], dtype=torch.double)).requires_grad_()
    images = torch.tensor([0, 1, 1, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda m, a, b: gather(m, [regular(*corners(images, a, b, m.shape))]), (maps, y, x))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=8), st.integers(1, 3), st.integers(0, 2**31))
def test_sums_of_any_lengths_and_their_transpose(lengths, channels, seed):
    generator = rng(seed)
    shape = (2, channels, 3, 2)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    pixels = torch.randint(13, (int(starts[-1]),), generator=generator)
    weights = torch.randn(len(pixels), dtype=torch.double, generator=generator)
    dense = torch.zeros(len(lengths), 13, dtype=torch.double)
    for bag in range(len(lengths)):
        for tap in range(int(starts[bag]), int(starts[bag + 1])):
            dense[bag, pixels[tap]] += weights[tap]
    x = torch.randn(shape, dtype=torch.double, generator=generator)
    grad = torch.randn(len(lengths), channels, dtype=torch.double, generator=generator)
    taps = [Taps(pixels, weights, starts)]
    table = x.permute(0, 2, 3, 1).reshape(-1, channels)
    torch.testing.assert_close(gather(x, taps), dense[:, :-1] @ table)
    wanted = (dense[:, :-1].t() @ grad).view(2, 3, 2, channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(scatter(grad, taps, shape), wanted)
    leaf = x.clone().requires_grad_()
    gather(leaf, taps).backward(grad)
    torch.testing.assert_close(leaf.grad, wanted)


def test_parts_are_put_together_in_order():
    x = torch.randn(1, 2, 3, 3, generator=rng())
    taps = [Taps(torch.tensor([n, n + 1]), torch.tensor([1.0, 2.0]), torch.tensor([0, 1, 2])) for n in range(3)]
    flat = x.flatten(2)[0].t()
    wanted = torch.stack([v for n in range(3) for v in (flat[n], 2 * flat[n + 1])])
    torch.testing.assert_close(gather(x, taps), wanted)
    grad = torch.randn(6, 2, generator=rng(1))
    leaf = x.clone().requires_grad_()
    gather(leaf, taps).backward(grad)
    torch.testing.assert_close(scatter(grad, taps, x.shape), leaf.grad)
    assert gather(x, []).shape == (0, 2)
    assert not scatter(x.new_zeros(0, 2), [], x.shape).any()


def test_zero_weight_does_not_bring_in_a_nan():
    x = torch.full((1, 1, 2, 2), torch.nan)
    outside = torch.tensor([5.0])
    assert gather(x, [regular(*bordered_corners(torch.tensor([0]), outside, outside, x.shape))]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_types_are_made_in_float32(dtype):
    x = torch.full((1, 1, 64, 64), 1.0, dtype=dtype)
    taps = [Taps(torch.arange(4096), torch.ones(4096), torch.tensor([0, 4096]))]
    assert gather(x, taps).item() == 4096
    assert gather(x, taps).dtype == torch.float32


def test_results_do_not_depend_on_the_number_of_threads():
    x = torch.randn(1, 64, 30, 30, generator=rng())
    pixels = torch.randint(900, (4000, 7), generator=rng(1))
    taps = [regular(pixels, torch.randn(4000, 7, generator=rng(2)))]
    grad = torch.randn(4000, 64, generator=rng(3))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((gather(x, taps), scatter(grad, taps, x.shape)))
    for out, by_x in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(by_x, found[0][1])


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 12))
def test_portions_cover_everything_and_keep_to_the_limit(counts, at_once):
    parts = list(portions(torch.tensor(counts, dtype=torch.int64), at_once))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(counts)))
    for part in parts:
        assert sum(counts[part]) <= at_once or part.stop - part.start == 1


def test_a_bin_of_millions_of_samples_is_refused():
    with pytest.raises(ValueError, match="bin 1 asks for 3000 x 3000 samples"):
        check_samples(torch.tensor([2, 3000]), torch.tensor([2, 3000]))


def test_the_first_of_the_largest_values_is_found_and_never_nan():
    values = torch.tensor([[1.0], [3.0], [3.0], [torch.nan], [-torch.inf], [torch.nan]])
    best, row = segment_argmax(values, torch.tensor([0, 0, 0, 0, 2, 2]), 3)
    smallest = torch.finfo(torch.float32).min
    assert_close("best", torch.tensor([[3.0], [smallest], [smallest]]), best, 0)
    assert row.tolist() == [[1], [-1], [-1]]
