"""Groups: every row is owned once, groups cross no sample, and what they borrow is what each rule says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.point_attention import TAILS, WindowKey, ZOrderKey, cut, group_points, order_rows

from .point_clouds import random_coords


def members_of(groups):
    """Members and number of own ones of each group that has some."""
    bounds = groups.starts.tolist()
    return [
        (groups.members[first:last].tolist(), own)
        for first, last, own in zip(bounds, bounds[1:], groups.owned.tolist(), strict=False)
        if last > first
    ]


def original_groups(order, counts, size):
    """FlatFormer's: a sample is filled up to whole groups, the last with the same places of the group before."""
    found, first = [], 0
    for count in counts:
        rows = order[first : first + count]
        first += count
        padded = -(-count // size) * size
        places = list(range(count))
        for at in range(count, padded):
            places.append(at - size if count >= size else at % count)
        for begin in range(0, padded, size):
            found.append(([rows[p] for p in places[begin : begin + size]], min(size, count - begin)))
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 17), st.sampled_from(TAILS))
def test_rows_are_owned_once_within_their_sample(counts, size, tail):
    coords = random_coords(counts)
    order, bounds = order_rows(ZOrderKey(), coords, (40, 30, 1), len(counts))
    groups = cut(order, bounds, size, tail)
    found = members_of(groups)
    assert sorted(row for members, own in found for row in members[:own]) == list(range(len(coords)))
    assert all(len(coords[members, 0].unique()) == 1 for members, _ in found)
    assert all(len(members) <= groups.size <= max(size, 1) for members, _ in found)
    assert len(found) == sum(-(-count // size) for count in counts)
    wanted = original_groups(order.tolist(), counts, size)
    if tail == "balanced":
        assert [row for members, _ in found for row in members] == order.tolist()
        assert all(len(members) == own for members, own in found)
        for sample in range(len(counts)):
            sizes = [len(members) for members, _ in found if coords[members[0], 0] == sample]
            assert not sizes or max(sizes) - min(sizes) <= 1
    elif tail == "parity":
        assert found == wanted
    else:
        assert found == [(members[:own] if len(set(members)) < size else members, own) for members, own in wanted]
    assert groups.owned.dtype == groups.starts.dtype == groups.members.dtype == torch.int32


@pytest.mark.parametrize("tail", TAILS)
def test_groups_of_a_sample_do_not_depend_on_the_others(tail):
    counts = [100, 7, 0, 53]
    coords = random_coords(counts, shuffled=False)
    whole = members_of(group_points(coords, (40, 30, 1), 4, WindowKey((9, 9, 1)), 16, tail))
    alone, first = [], 0
    for count in counts:
        one = coords[first : first + count].clone()
        one[:, 0] = 0
        found = members_of(group_points(one, (40, 30, 1), 1, WindowKey((9, 9, 1)), 16, tail))
        alone += [([row + first for row in members], own) for members, own in found]
        first += count
    assert whole == alone


def test_runs_may_be_windows():
    """The sets of DSVT: groups that do not leave their window."""
    coords, key = random_coords([300]), WindowKey((12, 12, 1))
    values, order = key(coords, (40, 30, 1)).sort()
    counts = torch.unique_consecutive(values // 144, return_counts=True)[1]
    bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    found = members_of(cut(order, bounds, 36))
    assert sorted(row for members, _ in found for row in members) == list(range(300))
    windows = coords[:, 2:] // 12
    assert all(len(windows[members].unique(dim=0)) == 1 for members, _ in found)


@pytest.mark.parametrize("tail", TAILS)
def test_no_rows_and_no_samples(tail):
    for bounds in ([0], [0, 0], [0, 0, 0]):
        groups = cut(torch.zeros(0, dtype=torch.int64), torch.tensor(bounds), 8, tail)
        assert members_of(groups) == []
        assert groups.rows == 0


def test_what_is_wrong_is_named():
    order, bounds = torch.arange(3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="group_size is 0"):
        cut(order, bounds, 0)
    with pytest.raises(ValueError, match="tail is 'loose', expected one of"):
        cut(order, bounds, 2, "loose")
