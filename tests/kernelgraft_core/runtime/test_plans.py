"""The plan store: looking up never measures, nothing measured is lost, and no file can break a program."""

import json
import multiprocessing
import os
import stat

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelgraft_core.runtime import plans
from kernelgraft_core.runtime.plans import PRESETS, PlanStore, plan_key

SHAPE = {"m": 16, "n": 4096, "dtype": "float16"}
ARCH = "cpu-test"


@pytest.fixture
def store(tmp_path):
    return PlanStore(tmp_path / "plans", tmp_path / "presets")


def again(store):
    """The same files, as a new process sees them."""
    return PlanStore(store._directory, store._presets)


def candidates(*tiles):
    return {f"tile {tile}": ({"tile": tile}, lambda tile=tile: tile) for tile in tiles}


def smallest_is_fastest(run):
    return float(run())


def never(run):
    raise AssertionError("measured")


def tuned(store, tile=32, version=1, shape=SHAPE):
    with store.tuning():
        return store.tune("gemm", version, ARCH, shape, candidates(tile, tile * 2), smallest_is_fastest)


def test_without_any_file_the_heuristic_decides(store):
    assert store.lookup("gemm", 1, ARCH, SHAPE) is None
    assert not store.should_tune("gemm", 1, ARCH, SHAPE)
    assert not store.directory.exists()  # looking up leaves no trace


def test_the_fastest_is_remembered_by_this_process_and_the_next(store):
    assert tuned(store) == {"tile": 32}
    for reader in (store, again(store)):
        assert reader.lookup("gemm", 1, ARCH, SHAPE) == {"tile": 32}
        assert reader.lookup("gemm", 1, ARCH, dict(reversed(SHAPE.items()))) == {"tile": 32}
        assert reader.lookup("gemm", 2, ARCH, SHAPE) is None
        assert reader.lookup("gemm", 1, "sm_90", SHAPE) is None
        assert reader.lookup("gemm", 1, ARCH, SHAPE | {"m": 32}) is None
    entry = json.loads(store.path(ARCH).read_text())["plans"][plan_key("gemm", 1, SHAPE)]
    assert entry["us"] == {"tile 32": 32.0, "tile 64": 64.0}
    assert entry["with"]["torch"] == torch.__version__


def test_a_measured_plan_replaces_what_was_looked_up_before(store):
    assert store.lookup("gemm", 1, ARCH, SHAPE) is None
    tuned(store)
    assert store.lookup("gemm", 1, ARCH, SHAPE) == {"tile": 32}
    tuned(store, 8)
    assert store.lookup("gemm", 1, ARCH, SHAPE) == {"tile": 8}


def test_the_users_plan_goes_before_the_shipped_one(store):
    store._presets.mkdir()
    other = SHAPE | {"m": 1}
    shipped = {plan_key("gemm", 1, s): {"params": {"tile": 128}} for s in (SHAPE, other)}
    (store._presets / f"{ARCH}.json").write_text(json.dumps({"schema": 1, "arch": ARCH, "plans": shipped}))
    assert store.lookup("gemm", 1, ARCH, SHAPE) == {"tile": 128}
    tuned(store)
    assert again(store).lookup("gemm", 1, ARCH, SHAPE) == {"tile": 32}
    assert again(store).lookup("gemm", 1, ARCH, other) == {"tile": 128}


def test_a_stored_plan_that_is_no_candidate_any_more_is_ignored(store):
    tuned(store)
    assert store.lookup("gemm", 1, ARCH, SHAPE, [{"tile": 64}]) is None
    assert store.lookup("gemm", 1, ARCH, SHAPE, [{"tile": 64}, {"tile": 32}]) == {"tile": 32}


def test_measuring_happens_only_when_asked_for_and_once_a_shape(store):
    with pytest.raises(RuntimeError, match=r"only inside `with PLANS\.tuning"):
        store.tune("gemm", 1, ARCH, SHAPE, candidates(1), never)
    with store.tuning():
        assert store.should_tune("gemm", 1, ARCH, SHAPE)
        store.tune("gemm", 1, ARCH, SHAPE, candidates(1), smallest_is_fastest)
        assert not store.should_tune("gemm", 1, ARCH, SHAPE)
        assert store.should_tune("gemm", 1, ARCH, SHAPE | {"m": 1})
    assert not store.should_tune("gemm", 1, ARCH, SHAPE | {"m": 1})


def test_a_candidate_that_cannot_run_is_left_out(store):
    def measure(run):
        if run() == 16:
            raise RuntimeError("out of shared memory")
        return float(run())

    with store.tuning():
        assert store.tune("gemm", 1, ARCH, SHAPE, candidates(16, 64), measure) == {"tile": 64}
        with pytest.raises(RuntimeError, match="no candidate could be measured: tile 16: RuntimeError: out of shared"):
            store.tune("gemm", 1, ARCH, SHAPE, candidates(16), measure)


@pytest.mark.parametrize("params", [{"tile": [1]}, {"tile": {"m": 1}}, {"tile": float("nan")}, {1: 2}, [1]])
def test_parameters_are_scalars_by_name(store, params):
    with store.tuning(), pytest.raises(ValueError, match="expected JSON scalars by name"):
        store.tune("gemm", 1, ARCH, SHAPE, {"odd": (params, lambda: None)}, never)


def test_nothing_is_measured_while_a_graph_is_captured(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with store.tuning(), pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        store.tune("gemm", 1, ARCH, SHAPE, candidates(1), never)


def test_what_was_measured_before_an_error_is_kept(store):
    def interrupt(run):
        raise KeyboardInterrupt

    def tune_two():
        with store.tuning():
            store.tune("gemm", 1, ARCH, SHAPE, candidates(32), smallest_is_fastest)
            store.tune("gemm", 1, ARCH, SHAPE | {"m": 1}, candidates(32), interrupt)

    with pytest.raises(KeyboardInterrupt):
        tune_two()
    assert again(store).lookup("gemm", 1, ARCH, SHAPE) == {"tile": 32}


def test_switched_off_no_stored_plan_is_used(store, monkeypatch):
    tuned(store)
    monkeypatch.setenv("KERNELGRAFT_PLANS", "off")
    off = again(store)
    assert off.lookup("gemm", 1, ARCH, SHAPE) is None
    with pytest.raises(RuntimeError, match="KERNELGRAFT_PLANS is off"), off.tuning():
        pass


def test_plans_cannot_be_changed_by_who_looks_them_up(store):
    tuned(store)
    with pytest.raises(TypeError):
        store.lookup("gemm", 1, ARCH, SHAPE)["tile"] = 1


CORRUPT = {
    "truncated": b'{"schema": 1, "plans": {"gemm@1|m=1": {"par',
    "not text": bytes(range(256)),
    "another schema": b'{"schema": 99, "plans": {}}',
    "not an object": b"[1, 2]",
    "no plans": b'{"schema": 1, "plans": 3}',
    "code instead of scalars": b'{"schema": 1, "plans": {"gemm@1|m=1": {"params": {"tile": ["import os"]}}}}',
    "nested to overflow": b"[" * 200_000,
    "empty": b"",
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_file_costs_one_warning_and_is_put_aside(store, content, caplog):
    tuned(store)
    path = store.path(ARCH)
    path.write_bytes(content)
    reader = again(store)
    for _ in range(3):
        assert reader.lookup("gemm", 1, ARCH, SHAPE) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert path.with_suffix(".bad").read_bytes() == content
    tuned(reader)  # and the store works on
    assert again(store).lookup("gemm", 1, ARCH, SHAPE) == {"tile": 32}


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["schema", "plans", "params", "gemm@1|m=1"]), inner, max_size=3)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_a_lookup_gives_a_plan_or_none(tmp_path, content):
    store = PlanStore(tmp_path / "plans")
    store.directory.mkdir(mode=0o700, exist_ok=True)
    store.path(ARCH).write_bytes(content)
    plan = store.lookup("gemm", 1, ARCH, {"m": 1})
    assert plan is None or plans._is_plan(plan)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 2), st.integers(1, 4), st.integers(1, 99)), max_size=8))
@settings(max_examples=40, deadline=None)
def test_the_store_is_a_dictionary_that_outlives_the_process(tmp_path_factory, writes):
    store = PlanStore(tmp_path_factory.mktemp("plans"))
    model = {}
    for op, version, m, tile in writes:
        with store.tuning():
            store.tune(op, version, ARCH, {"m": m}, candidates(tile), smallest_is_fastest)
        model[op, version, m] = tile
    for reader in (store, again(store)):
        for op in "ab":
            for version in (1, 2):
                for m in range(1, 5):
                    found = reader.lookup(op, version, ARCH, {"m": m})
                    assert (found and found["tile"]) == model.get((op, version, m))


def test_the_directory_is_the_owners_alone(store):
    tuned(store)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path(ARCH).stat().st_mode) == 0o600


def test_a_directory_that_everybody_can_write_is_refused(store, caplog):
    tuned(store)
    store.directory.chmod(0o777)
    reader = again(store)
    assert reader.lookup("gemm", 1, ARCH, SHAPE) is None
    assert "is writable by others (mode 777)" in caplog.text
    before = store.path(ARCH).read_bytes()
    assert tuned(reader, 8) == {"tile": 8}
    assert store.path(ARCH).read_bytes() == before
    assert "are not saved" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners on this system")
def test_a_directory_of_somebody_else_is_refused(store, caplog, monkeypatch):
    tuned(store)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert again(store).lookup("gemm", 1, ARCH, SHAPE) is None
    assert f"belongs to user {owner}, not to {owner + 1}" in caplog.text


def test_a_failed_write_leaves_the_old_file_and_no_debris(store, monkeypatch, caplog):
    tuned(store)
    before = store.path(ARCH).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    tuned(store, 8)
    assert store.path(ARCH).read_bytes() == before
    assert not list(store.directory.glob(".plans-*"))
    assert "No space left on device" in caplog.text
    assert store.lookup("gemm", 1, ARCH, SHAPE) == {"tile": 8}  # in memory still
    monkeypatch.undo()
    store.save()
    assert again(store).lookup("gemm", 1, ARCH, SHAPE) == {"tile": 8}


def _write_many(directory, presets, writer, start):
    store = PlanStore(directory, presets)
    start.wait()
    for i in range(5):
        tuned(store, tile=writer + 1, shape={"writer": writer, "i": i})


def test_four_processes_that_write_at_once_lose_nothing(store):
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    start = context.Event()
    writers = [
        context.Process(target=_write_many, args=(store._directory, store._presets, writer, start))
        for writer in range(4)
    ]
    for process in writers:
        process.start()
    start.set()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0] * 4
    for writer in range(4):
        for i in range(5):
            assert store.lookup("gemm", 1, ARCH, {"writer": writer, "i": i}) == {"tile": writer + 1}


def test_every_shipped_preset_can_be_read():
    for path in PRESETS.glob("*.json"):
        assert plans._parse(path.read_bytes()), path
        assert json.loads(path.read_bytes())["arch"] == path.stem
