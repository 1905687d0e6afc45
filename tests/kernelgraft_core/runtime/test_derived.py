"""What is kept beside tensors: found again, and made anew when it has to be."""

import gc

import torch

from kernelgraft_core.runtime.derived import Derived, DerivedOfValues


def counting():
    made = []
    return lambda: made.append(None) or len(made)


def test_the_same_tensors_find_what_was_made_and_changed_ones_do_not():
    table, x, y = Derived(), torch.ones(2), torch.ones(2)
    make = counting()
    assert [table.of((x, y), make) for _ in range(2)] == [1, 1]
    assert table.of((x, None), make) == 2
    x.add_(1)
    assert table.of((x, None), make) == 3
    del x
    gc.collect()
    assert len(table) == 0


def test_values_are_compared_where_writes_may_be_hidden():
    table, x = DerivedOfValues(), torch.nn.Parameter(torch.ones(2))
    make = counting()
    assert [table.of((x, None), make) for _ in range(2)] == [1, 1]
    x.data.copy_(torch.zeros(2))  # no version tells
    assert [table.of((x, None), make) for _ in range(2)] == [2, 2]
    x.data = torch.full((2,), 3.0)
    assert table.of((x, None), make) == 3
    x.data = x.data.half()
    assert [table.of((x, None), make) for _ in range(2)] == [4, 4]
