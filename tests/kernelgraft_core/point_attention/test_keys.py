"""Keys: the order of FlatFormer's windows equals its formula, curves visit every cell once, samples never mix."""

import itertools

import pytest
import torch

from kernelgraft_core.point_attention import HilbertKey, WindowKey, ZOrderKey, batch_key, order_rows

from .point_clouds import random_coords


def original_value(x, y, window, axis, shifted, windows_along):
    """What FlatFormer sorts a cell of a sample by, for square windows."""
    if shifted:
        x, y = x + window // 2, y + window // 2
    if axis == "y":
        x, y = y, x
    x1, y1, x2, y2 = x // window, y // window, x % window, y % window
    sign, inner = (-1) ** y1, (-1) ** x2
    outer = (2 * windows_along * y1 + sign * x1) * 4 * window**2
    return outer + sign * (2 * window * x2 + inner * y2)


@pytest.mark.parametrize("window", [2, 9, 13])
@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_go_the_way_of_the_original(window, axis, shifted):
    grid = (40, 31, 1)
    coords = random_coords([40 * 31], grid)
    key = WindowKey((window, window, 1), axis, shifted)
    found = coords[order_rows(key, coords, grid, 1)[0]].tolist()
    wanted = sorted(coords.tolist(), key=lambda c: original_value(c[3], c[2], window, axis, shifted, 100))
    assert found == wanted


@pytest.mark.parametrize("shape", [(3, 5, 1), (5, 3, 2), (1, 1, 1), (50, 1, 4)], ids=str)
@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_any_shape_are_whole_and_visit_every_cell(shape, axis, shifted):
    grid = (12, 17, 5)
    coords = random_coords([12 * 17 * 5], grid)
    key = WindowKey(shape, axis, shifted)
    values = key(coords, grid)
    assert len(values.unique()) == len(values)
    assert values.min() >= 0
    assert values.max() < key.span(grid)
    shift = (shape[0] // 2, shape[1] // 2) if shifted else (0, 0)
    windows = [
        ((x + shift[0]) // shape[0], (y + shift[1]) // shape[1], z // shape[2])
        for _, z, y, x in coords[values.argsort()].tolist()
    ]
    runs = [window for window, _ in itertools.groupby(windows)]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("grid", [(8, 8, 1), (4, 4, 4), (1, 16, 16)], ids=str)
def test_hilbert_has_no_jumps(grid):
    cells = grid[0] * grid[1] * grid[2]
    coords = random_coords([cells], grid)
    values = HilbertKey()(coords, grid)
    ordered = coords[values.argsort()][:, 1:]
    assert len(values.unique()) == cells
    if grid[0] > 1:  # of a cube only: a part of one is left and entered again
        assert (ordered.diff(dim=0).abs().sum(1) == 1).all()
        assert values.sort().values.tolist() == list(range(cells))


def test_z_order_takes_the_bits_in_turns():
    coords = torch.tensor([[0, 0, 0b011, 0b101], [0, 0, 0b000, 0b111], [0, 0, 0b100, 0b000]], dtype=torch.int32)
    assert ZOrderKey()(coords, (8, 8, 1)).tolist() == [0b011011, 0b010101, 0b100000]
    coords = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    assert ZOrderKey()(coords, (4, 4, 4)).tolist() == [0b011101]


@pytest.mark.parametrize(
    "key", [WindowKey((13, 13, 1)), ZOrderKey(), HilbertKey(), lambda coords, grid: -coords[:, 3].long()], ids=str
)
def test_samples_do_not_mix_whatever_the_key_is(key):
    coords = random_coords([300, 0, 1, 200], (32, 32, 1))  # small enough for the original to mix them
    order, bounds = order_rows(key, coords, (32, 32, 1), 4)
    assert bounds.tolist() == [0, 300, 300, 301, 501]
    assert coords[order, 0].tolist() == [0] * 300 + [2] + [3] * 200
    assert sorted(order.tolist()) == list(range(501))
    for first, last in itertools.pairwise(bounds.tolist()):
        values = key(coords, (32, 32, 1))[order[first:last]]
        assert (values.diff() >= 0).all()
        ties = values.diff() == 0
        assert (order[first:last].diff()[ties] > 0).all()  # rows with one value stay in their order


def test_keys_of_large_grids_are_right_or_refused():
    grid = (1 << 20, 1 << 20, 1)
    corner = torch.tensor([[1, 0, grid[1] - 1, grid[0] - 1]], dtype=torch.int32)
    for key in (WindowKey((9, 9, 1)), ZOrderKey(), HilbertKey()):
        assert key.span(grid) <= batch_key(key, corner, grid, 2).item() < 2 * key.span(grid)
        with pytest.raises(ValueError, match=r"have \d+ keys, more than 2\^62"):
            batch_key(key, corner, ((1 << 31) - 1, (1 << 31) - 1, 1), 2)


def test_no_rows():
    for key in (WindowKey((9, 9, 1)), ZOrderKey(), HilbertKey(), lambda coords, grid: coords[:, 0].long()):
        order, bounds = order_rows(key, torch.zeros(0, 4, dtype=torch.int32), (8, 8, 1), 2)
        assert order.shape == (0,)
        assert bounds.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": torch.zeros(3, 4)}, r"coords is torch\.float32 \(3, 4\)"),
        ({"coords": torch.zeros(3, 3, dtype=torch.int32)}, r"coords is torch\.int32 \(3, 3\)"),
        ({"coords": torch.tensor([[2, 0, 0, 0]])}, "sample of coords goes from 2 to 2, expected 0 to 1"),
        ({"coords": torch.tensor([[0, 0, 7, 0]])}, "y of coords goes from 7 to 7, expected 0 to 6"),
        ({"coords": torch.tensor([[0, 0, 0, -1]])}, "x of coords goes from -1 to -1, expected 0 to 7"),
        ({"grid_shape": (8, 7)}, r"grid_shape is \(8, 7\)"),
        ({"grid_shape": (8, 0, 1)}, r"grid_shape is \(8, 0, 1\)"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"key": lambda coords, grid: coords[:, :1].long()}, r"torch\.int64 \(1, 1\) for 1 rows"),
        ({"key": lambda coords, grid: coords[:, 0].float()}, r"torch\.float32 \(1,\)"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {"key": ZOrderKey(), "coords": torch.tensor([[1, 0, 6, 7]]), "grid_shape": (8, 7, 1), "batch_size": 2}
    assert batch_key(**right).shape == (1,)
    with pytest.raises(ValueError, match=message):
        batch_key(**right | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((9, 9),), "window_shape"), (((9, 0, 1),), "window_shape"), (((9, 9, 1), "z"), "axis is 'z'")],
)
def test_windows_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowKey(*arguments)


def test_traced_coordinates_leave_nothing_behind():
    from torch.fx.experimental.proxy_tensor import make_fx

    coords = torch.tensor([[0, 0, y, x] for y in range(20) for x in range(20)], dtype=torch.int32)
    key, grid = WindowKey([7, 7, 1]), (20, 20, 1)
    traced = make_fx(lambda c: key(c, grid), tracing_mode="symbolic")(coords)
    functional = torch.func.functionalize(lambda c: key(c, grid))(coords)
    found = key(coords, grid)
    assert type(found) is torch.Tensor
    assert torch.equal(found, traced(coords))
    assert torch.equal(found, functional)
    assert torch.equal(found, key._number(coords, grid))
