"""parallel_for: every item is done exactly once, whatever the number of threads and whoever calls."""

import ctypes
import logging
import multiprocessing
import os
import sys
import threading

import numpy as np
import pytest
import torch

from kernelgraft_core.runtime import threads

numba = pytest.importorskip("numba")
native = pytest.importorskip("kernelgraft_core.runtime.native")


@native.cpu_kernel()
def count_visits(start, stop, args):
    visits = numba.carray(native.pointer(args[1]), (args[0],), np.int64)
    runs = numba.carray(native.pointer(args[2]), (args[0] + 1,), np.int64)
    runs[start] += stop - start
    for i in range(start, stop):
        visits[i] += 1


def run(items, **options):
    """Visits per item, and the runs as {start: length}."""
    visits, runs = np.zeros(items, np.int64), np.zeros(items + 1, np.int64)
    args = (ctypes.c_int64 * 3)(items, visits.ctypes.data, runs.ctypes.data)
    threads.parallel_for(count_visits.address, args, items, **options)
    return visits, {int(i): int(runs[i]) for i in runs.nonzero()[0]}


@pytest.fixture(params=["openmp", "pool"])
def split(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp_team", lambda: None)
    elif threads._openmp_team() is None:
        pytest.skip("torch has no GOMP_parallel here")


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 2, 5, 97, 1000])
@pytest.mark.parametrize("grain", [1, 8, 1001])
def test_every_item_is_visited_once_in_runs_that_begin_at_the_grain(items, grain, count, torch_threads):
    torch_threads(count)
    visits, runs = run(items, grain=grain)
    assert (visits == 1).all()
    assert all(start % grain == 0 for start in runs)
    assert len(runs) == min(count, -(-items // grain))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("count", [2, 3])
def test_given_bounds_are_the_runs(count, torch_threads):
    torch_threads(count)
    visits, runs = run(50, bounds=[0, 1, 1, 30, 49, 50])
    assert (visits == 1).all()
    assert runs == {0: 1, 1: 29, 30: 19, 49: 1}


def test_the_runs_differ_by_one_grain_at_most(torch_threads):
    torch_threads(5)
    lengths = run(33, grain=2)[1].values()
    assert max(lengths) - min(lengths) <= 2


@pytest.mark.parametrize("bad", [[0, 5], [0, 7, 6, 10], [1, 10], [10], [], [0, 4, 11]])
def test_bounds_that_do_not_cover_the_items_are_refused(bad):
    with pytest.raises(ValueError, match="do not ascend from 0 to 10"):
        run(10, bounds=bad)


def test_negative_sizes_are_refused_by_value():
    args = (ctypes.c_int64 * 1)(0)
    with pytest.raises(ValueError, match="items is -1 and grain 1"):
        threads.parallel_for(count_visits.address, args, -1)
    with pytest.raises(ValueError, match="grain 0"):
        threads.parallel_for(count_visits.address, args, 4, grain=0)


@pytest.mark.usefixtures("split")
def test_several_python_threads_may_call_at_once_between_torch_operators(torch_threads):
    torch_threads(3)
    a = torch.randn(96, 96)
    expected, wrong = a @ a, []

    def work():
        torch.set_num_threads(3)
        for items in (1, 17, 1000, 64):
            if not (run(items)[0] == 1).all() or not torch.allclose(a @ a, expected, atol=1e-4):
                wrong.append(items)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.usefixtures("split")
def test_a_changed_number_of_threads_is_followed(torch_threads):
    for count in (2, 4, 1, 3):
        torch_threads(count)
        assert len(run(100)[1]) == count


def _in_child(answers):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("kernelgraft").addHandler(handler)
    visits, runs = run(1000)
    run(1000)
    answers.put(
        ((visits == 1).all().item(), len(runs), len([r for r in records if "forked" in r]), threads.mechanism())
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_runs_on_one_thread_and_says_so_once(torch_threads):
    torch_threads(2)
    run(1000)  # the parent's team exists, and would be gone in the child
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(answers,))
    child.start()
    answer = answers.get(timeout=30)
    child.join(30)
    assert answer == (True, 1, 1, "one thread (forked)")
    assert child.exitcode == 0
    assert len(run(1000)[1]) == 2  # the parent is as before


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is found through the dynamic linker of Linux")
def test_the_team_is_torchs_own(torch_threads):
    if not torch.backends.openmp.is_available():
        pytest.skip("torch was built without OpenMP")
    torch_threads(4)
    torch.randn(512, 512) @ torch.randn(512, 512)
    run(1000)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        torch.randn(512, 512) @ torch.randn(512, 512)
        run(1000)
    assert threads.mechanism() == "openmp"
    assert len(os.listdir("/proc/self/task")) == before


@native.cpu_kernel()
def write_numbers(start, stop, args):
    first = numba.carray(native.pointer(args[2]), (args[1],), np.int64)
    for i in range(start, stop):
        first[i] += i + 1


@native.cpu_kernel()
def read_from_the_other_end(start, stop, args):
    first = numba.carray(native.pointer(args[2]), (args[1],), np.int64)
    second = numba.carray(native.pointer(args[3]), (args[1],), np.int64)
    for i in range(start, stop):
        second[i] += first[args[1] - 1 - i]


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "pool"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_phase_of_a_launch_begins_when_the_one_before_is_done(openmp, count, torch_threads, monkeypatch):
    if not openmp:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
        monkeypatch.setattr(threads, "_openmp_team", lambda: None)
    torch_threads(count)
    for items in (0, 1, 5, 1000):
        first, second = np.zeros(items, np.int64), np.zeros(items, np.int64)
        launch = threads.Launch(
            threads.Phase(write_numbers.address, items, 3), threads.Phase(read_from_the_other_end.address, items)
        )
        for _ in range(20):
            first[:], second[:] = 0, 0
            launch(items, first.ctypes.data, second.ctypes.data)
            assert (first == np.arange(1, items + 1)).all()
            assert (second == first[::-1]).all()
