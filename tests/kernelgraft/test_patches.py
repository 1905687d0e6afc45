"""PatchSet: every change is undone exactly, and never where somebody else has changed the place since."""

import types
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraft.errors import PatchConflict, PluginError
from kernelgraft.patches import PatchSet


class Base:
    def inherited(self):
        return "inherited"


class Host(Base):
    def method(self):
        return "method"

    @staticmethod
    def static():
        return "static"

    @classmethod
    def made_by(cls):
        return cls.__name__

    @property
    def computed(self):
        return "computed"


class Slotted:
    __slots__ = ("value",)


@pytest.fixture
def host():
    module = types.ModuleType("host")
    module.function = lambda: "original"
    module.registry = {"first": 1, "second": 2}
    return module


@pytest.mark.parametrize("name", ["method", "static", "made_by", "inherited"])
def test_a_class_is_left_as_it_was_found(name):
    before = dict(vars(Host))
    patches = PatchSet("mine")
    patches.attr(Host, name, lambda *_: "patched")
    assert Host().static() == "patched" if name == "static" else getattr(Host(), name)() == "patched"
    patches.undo()
    assert dict(vars(Host)) == before
    assert Host().inherited() == "inherited"
    assert Host.static() == "static"
    assert Host.made_by() == "Host"


def test_modules_and_instances_are_left_as_they_were_found(host):
    instance, function = Host(), host.function
    patches = PatchSet("mine")
    patches.attr(host, "function", lambda: "patched")
    patches.attr(instance, "method", lambda: "patched")
    assert (host.function(), instance.method()) == ("patched", "patched")
    patches.undo()
    assert host.function is function
    assert vars(instance) == {}


def test_an_attribute_that_a_module_makes_on_demand_is_made_on_demand_again(host):
    host.__getattr__ = lambda name: f"lazy {name}"
    patches = PatchSet("mine")
    patches.attr(host, "late", "patched")
    assert host.late == "patched"
    patches.undo()
    assert host.late == "lazy late"
    assert "late" not in vars(host)


@pytest.mark.parametrize("name", ["method", "static", "made_by", "inherited"])
def test_a_wrapped_function_keeps_its_kind_and_its_arguments(name):
    expected = getattr(Host(), name)()
    patches = PatchSet("mine")
    patches.wrap(Host, name, lambda function: lambda *args: f"<{function(*args)}>")
    assert getattr(Host(), name)() == f"<{expected}>"
    patches.undo()
    assert getattr(Host(), name)() == expected


def test_a_module_function_is_wrapped(host):
    patches = PatchSet("mine")
    patches.wrap(host, "function", lambda function: lambda: f"<{function()}>")
    assert host.function() == "<original>"


def test_registry_entries_come_back_in_their_order(host):
    patches = PatchSet("mine")
    patches.item(host.registry, "first", "patched")
    patches.item(host.registry, "third", "new")
    assert host.registry == {"first": "patched", "second": 2, "third": "new"}
    patches.undo()
    assert list(host.registry.items()) == [("first", 1), ("second", 2)]


def test_changes_are_undone_newest_first_even_on_one_place(host):
    log = []
    patches = PatchSet("mine")
    for step in (1, 2, 3):
        patches.item(host.registry, "first", f"patched {step}")
        patches.on_undo(f"step {step}", lambda step=step: log.append((step, host.registry["first"])))
    assert patches.targets()[:2] == ["entry 'first' of dict", "step 1"]
    patches.undo()
    assert log == [(3, "patched 3"), (2, "patched 2"), (1, "patched 1")]
    assert host.registry["first"] == 1
    assert patches.targets() == []
    patches.undo()


@pytest.mark.parametrize(
    ("target", "name", "error", "message"),
    [
        (Host, "moved", AttributeError, r"mine cannot patch .*Host\.moved: there is no such attribute"),
        (Host(), "computed", TypeError, "computed by its class"),
        (Slotted(), "value", AttributeError, "no such attribute"),
    ],
)
def test_what_could_not_be_put_back_is_refused(target, name, error, message):
    patches = PatchSet("mine")
    with pytest.raises(error, match=message):
        patches.attr(target, name, "patched")
    assert patches.targets() == []


def test_a_target_that_keeps_the_attribute_elsewhere_is_refused_and_unchanged():
    class Hoarder:
        def __init__(self):
            vars(self)["_hoard"] = {"value": 1}

        def __getattr__(self, name):
            return self._hoard[name]

        def __setattr__(self, name, value):
            self._hoard[name] = value

    hoarder = Hoarder()
    with pytest.raises(TypeError, match="not kept in the target's __dict__"):
        PatchSet("mine").attr(hoarder, "value", 2)
    assert hoarder.value == 1


def test_a_place_somebody_else_has_changed_is_not_undone_until_they_are_gone(host):
    original, stranger = host.function, lambda: "stranger"
    patches = PatchSet("mine")
    patches.item(host.registry, "first", "patched")
    patches.attr(host, "function", lambda: "patched")
    patches.item(host.registry, "second", "patched")
    patched, host.function = host.function, stranger

    with pytest.raises(PatchConflict, match=r"host\.function was changed by something other.*'mine'.*<lambda>"):
        patches.undo()
    assert host.function is stranger
    assert host.registry == {"first": "patched", "second": "patched"}  # nothing was undone half way
    assert len(patches.targets()) == 3

    host.function = patched
    patches.undo()
    assert host.function is original
    assert host.registry == {"first": 1, "second": 2}


def test_a_removed_entry_is_a_conflict_too(host):
    patches = PatchSet("mine")
    patches.item(host.registry, "first", "patched")
    del host.registry["first"]
    with pytest.raises(PatchConflict, match="to nothing"):
        patches.undo()


def test_two_plugins_on_one_place_are_undone_in_reverse_or_not_at_all(host):
    original = host.function
    first, second = PatchSet("first"), PatchSet("second")
    first.wrap(host, "function", lambda function: lambda: f"first({function()})")
    second.wrap(host, "function", lambda function: lambda: f"second({function()})")

    with pytest.raises(PatchConflict, match="patched by 'second' after 'first': unload 'second' first, then 'first'"):
        first.undo()
    assert host.function() == "second(first(original))"

    second.undo()
    assert host.function() == "first(original)"
    first.undo()
    assert host.function is original


def test_an_older_plugin_may_not_patch_over_a_newer_one(host):
    older, newer = PatchSet("older"), PatchSet("newer")
    newer.item(host.registry, "first", "newer")
    with pytest.raises(PatchConflict, match="'older' cannot patch it before 'newer' is unloaded"):
        older.item(host.registry, "first", "older")
    assert host.registry["first"] == "newer"


def test_one_undo_function_that_fails_does_not_keep_the_others_in_place(host):
    original = host.function
    patches = PatchSet("mine")
    patches.attr(host, "function", lambda: "patched")
    patches.on_undo("a cache", lambda: {}["gone"])
    with pytest.raises(PluginError, match=r"mine could not undo a cache \(KeyError: 'gone'\)") as caught:
        patches.undo()
    assert isinstance(caught.value.__cause__, KeyError)
    assert host.function is original
    assert patches.targets() == []


def test_the_way_out_of_a_failed_load_undoes_all_but_the_conflicts(host):
    patches = PatchSet("mine")
    patches.item(host.registry, "first", "patched")
    patches.item(host.registry, "second", "patched")
    host.registry["second"] = "stranger"
    with pytest.raises(PluginError, match="could not undo entry 'second' of dict"):
        patches.undo(leave_conflicts=True)
    assert host.registry == {"first": 1, "second": "stranger"}


STEPS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["a", "b", "new"])), max_size=12)


@given(steps=STEPS, attempts=st.permutations([0, 1, 2]))
def test_whatever_the_order_undoing_always_ends_where_it_began(steps, attempts):
    registry = {"a": object(), "b": object()}
    original = dict(registry)
    sets = [PatchSet(name) for name in ("zero", "one", "two")]
    for index, key in steps:
        try:
            sets[index].item(registry, key, object())
        except PatchConflict:
            continue
    for index in attempts:  # each either undoes everything of its own or changes nothing
        before, targets = dict(registry), sets[index].targets()
        try:
            sets[index].undo()
        except PatchConflict:
            assert (registry, sets[index].targets()) == (before, targets)
        else:
            assert sets[index].targets() == []
    for patches in sorted(sets, key=attrgetter("_age"), reverse=True):
        patches.undo()
    assert registry == original
