"""The timer: it ranks what is slower as slower, and records what a result must be read with."""

import json
import time
from itertools import pairwise

import pytest
import torch

from kernelgraft_core.runtime import timing
from kernelgraft_core.runtime.timing import Times, environment, measure_in_turns, measure_us, rotated


def test_percentiles_of_known_samples():
    times = Times.of([float(t) for t in range(11)])
    assert times == Times(p20=2.0, p50=5.0, p80=8.0, min=0.0, n=11)
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0, 7.0, 1)


def test_a_sleep_takes_as_long_as_it_takes():
    times = measure_in_turns(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}, rounds=3, sample_us=1000
    )
    assert times["short"].min >= 1000
    assert times["long"].min >= 4000
    assert times["long"].p50 > times["short"].p50
    assert times["long"].n == 3


def test_variants_take_turns():
    order = []
    measure_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, sample_us=1)
    changes = sum(x != y for x, y in pairwise(order))
    assert changes >= 5  # a b a b a b at the least


def test_one_run_is_measured_in_microseconds():
    assert measure_us(lambda: time.sleep(0.002), rounds=2) >= 2000


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="0 rounds on 'cpu'"):
        measure_in_turns({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="'tpu'"):
        measure_in_turns({"a": int}, device="tpu")


def test_the_environment_is_json_and_names_versions_and_machine():
    env = environment()
    json.dumps(env)
    recorded = "kernelgraft git dirty torch triton numba python cpu cores threads load gpu sm driver cuda date"
    for key in recorded.split():
        assert key in env
    assert env["cpu"]
    assert env["threads"] >= 1


def test_rotated_operands_are_more_than_the_cache_holds_and_take_turns(monkeypatch):
    monkeypatch.setattr(timing.devices, "cpu_info", lambda: type("Cpu", (), {"last_level_cache": 4000})())
    seen = []
    run = rotated(lambda x: seen.append(x.data_ptr()) or x, torch.ones(1000 // 4))
    for _ in range(18):
        run()
    assert len(set(seen)) == 9  # twice 4000 bytes in pieces of 1000, and one more
    assert seen[:9] == seen[9:]
