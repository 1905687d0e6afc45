"""Plugins are found lazily, loaded one at a time, kept apart, and taken off without trace."""

import importlib
import logging
import sys

import pytest

from kernelgraft.errors import IncompatibleHost, InvalidOption, PatchConflict, PluginError, PluginNotFound
from kernelgraft.manager import Manager

GRAFT = """
@hookimpl
def kernelgraft_info():
    return PluginInfo({name!r}, "for a test", hosts=(HostRequirement("fakehost", ("fakehost",), ">=1,<2"),))

class Offer:
    def __init__(self, options):
        self.options = dict(options)

@hookimpl
def kernelgraft_apply(patches, options):
    import fakehost
    patches.attr(fakehost, "VALUE", {name!r})
    if options.get("fail"):
        raise RuntimeError("half way")
    if options.get("refuse"):
        raise ValueError("no such option 'refuse'")
    if not options.get("silent"):
        return Offer(options)
"""
KERNELS = """
from kernelgraft_core.runtime.op import Implementation

@hookimpl
def kernelgraft_register_kernels():
    run = lambda *args: args[0].new_full((args[0].shape[0], args[1].shape[0]), 7.0)
    yield Kernel({op!r}, "kernelgraft_core.quant.w4a16.ops", Implementation("fake", run, ("cpu",), 99))
"""
TWO_HOSTS = """
@hookimpl
def kernelgraft_info():
    engine = HostRequirement("fakeengine", ("fakeengine-cpu", "fakeengine"), ">=1", in_process=False)
    return PluginInfo("twice", "for a test", hosts=(HostRequirement("fakehost", ("fakehost",), ">=1"), engine))

@hookimpl
def kernelgraft_apply(patches, options):
    host = __import__(options["host"])
    patches.attr(host, "VALUE", "grafted")
"""


@pytest.fixture
def host(site):
    site.host("fakehost", "1.5")
    return importlib.import_module("fakehost")


@pytest.fixture
def manager(site, host):
    site.plugin("graft-one", GRAFT.format(name="graft-one"))
    return Manager()


def kernel_backends():
    from kernelgraft_core.quant.w4a16 import ops  # noqa: F401  defines the op
    from kernelgraft_core.runtime.op import registered_ops

    return registered_ops()["w4a16_linear"].backends("cpu")


def test_a_plugin_is_grafted_and_taken_off(manager, host):
    handle = manager.load("graft-one", {"size": 3})
    assert host.VALUE == "graft-one"
    assert handle.info.name == "graft-one"
    assert handle.hosts == ("fakehost",)
    assert handle.options == {"size": 3, "host": "fakehost"}  # an attribute of the object the plugin offers
    assert repr(handle) == "<kernelgraft plugin 'graft-one' on fakehost>"
    handle.unload()
    assert host.VALUE == "original"
    handle.unload()
    manager.unload("graft-one")


def test_a_handle_unloads_at_the_end_of_its_block(manager, host):
    with manager.load("graft-one", {}) as handle:
        assert host.VALUE == "graft-one"
        with pytest.raises(AttributeError, match="has no attribute 'missing'"):
            _ = handle.missing
    assert host.VALUE == "original"


def test_names_may_be_written_with_underscores(manager):
    assert manager.load("graft_one", {}) is manager.load("graft-one", {})


def test_loading_twice_gives_the_same_handle_and_other_options_are_refused(manager, host):
    handle = manager.load("graft-one", {})
    assert manager.load("graft-one", {"host": "fakehost"}) is handle
    with pytest.raises(PluginError, match=r"is loaded with .*: unload it before loading it with .*'size': 4"):
        manager.load("graft-one", {"size": 4})
    handle.unload()
    assert manager.load("graft-one", {"size": 4}) is not handle


def test_a_load_that_fails_half_way_leaves_nothing_behind(site, host):
    site.plugin("graft-one", GRAFT.format(name="graft-one") + KERNELS.format(op="w4a16_linear"))
    manager, backends = Manager(), kernel_backends()
    with pytest.raises(PluginError, match="'graft-one' from graft-one-dist cannot be loaded: RuntimeError: half way"):
        manager.load("graft-one", {"fail": True})
    assert host.VALUE == "original"
    assert kernel_backends() == backends
    with pytest.raises(ValueError, match="no such option"):
        manager.load("graft-one", {"refuse": True})
    assert host.VALUE == "original"
    with manager.load("graft-one", {}):
        assert host.VALUE == "graft-one"
        assert kernel_backends() == ("fake", *backends)
    assert kernel_backends() == backends


def test_kernels_of_an_op_that_does_not_exist_are_refused(site, host):
    site.plugin("graft-one", GRAFT.format(name="graft-one") + KERNELS.format(op="w4a17_linear"))
    with pytest.raises(PluginError, match=r"op 'w4a17_linear'.*does not define; known: .*w4a16_linear"):
        Manager().load("graft-one", {})
    assert host.VALUE == "original"


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_a_host_outside_the_range_is_not_touched(site, version):
    site.host("fakehost", version, "raise AssertionError('touched')")
    site.plugin("graft-one", GRAFT.format(name="graft-one"))
    with pytest.raises(IncompatibleHost, match=rf"needs fakehost >=1,<2: fakehost {version} is outside"):
        Manager().load("graft-one", {})
    assert "fakehost" not in sys.modules


def test_one_plugin_on_two_hosts_has_a_graft_for_each(site, host):
    site.plugin("twice", TWO_HOSTS)
    manager = Manager()
    manager.load("twice", {})  # the engine is missing, but nobody asked for it
    with pytest.raises(IncompatibleHost, match="needs fakeengine-cpu or fakeengine >=1: none is installed"):
        manager.load("twice", {"host": "fakeengine"})
    with pytest.raises(InvalidOption, match="no host 'torch'; it offers: fakehost, fakeengine"):
        manager.load("twice", {"host": "torch"})

    site.host("fakeengine", "1.0")
    engine = importlib.import_module("fakeengine")
    on_engine = manager.load("twice", {"host": "fakeengine"})
    assert (host.VALUE, engine.VALUE) == ("grafted", "grafted")
    on_engine.unload()
    assert (host.VALUE, engine.VALUE) == ("grafted", "original")
    manager.load("twice", {"host": "fakeengine"})
    manager.unload("twice")
    assert (host.VALUE, engine.VALUE) == ("original", "original")


def test_a_plugin_that_only_its_host_loads_is_not_loaded_silently_onto_nothing(site):
    source = TWO_HOSTS.replace('HostRequirement("fakehost", ("fakehost",), ">=1"), engine', "engine,")
    site.plugin("twice", source)
    with pytest.raises(InvalidOption, match="name the host: fakeengine"):
        Manager().load("twice", {})


def test_kernels_stay_until_the_last_graft_is_taken_off(site, host):
    site.host("fakeengine", "1.0")
    site.plugin("twice", TWO_HOSTS + KERNELS.format(op="w4a16_linear"))
    manager, backends = Manager(), kernel_backends()
    first, second = manager.load("twice", {}), manager.load("twice", {"host": "fakeengine"})
    first.unload()
    assert "fake" in kernel_backends()
    second.unload()
    assert kernel_backends() == backends


def test_plugins_on_one_patch_point_are_unloaded_in_reverse(site, manager, host):
    site.plugin("graft-two", GRAFT.format(name="graft-two"))
    manager = Manager()
    manager.load("graft-one", {})
    manager.load("graft-two", {})
    with pytest.raises(PatchConflict, match=r"fakehost\.VALUE .* unload 'graft-two' first, then 'graft-one'"):
        manager.unload("graft-one")
    assert host.VALUE == "graft-two"
    assert [row.loaded for row in manager.status() if row.name.startswith("graft")] == [("fakehost",)] * 2
    manager.unload("graft-two")
    manager.unload("graft-one")
    assert host.VALUE == "original"


def test_an_undo_function_that_fails_is_reported_and_the_plugin_is_off(site, host):
    site.plugin("graft-one", GRAFT.format(name="graft-one") + "    patches.on_undo('it', lambda: 1 / 0)\n")
    manager = Manager()
    manager.load("graft-one", {"silent": True})
    with pytest.raises(PluginError, match="could not undo it"):
        manager.unload("graft-one")
    assert host.VALUE == "original"
    manager.load("graft-one", {"silent": True})
    assert host.VALUE == "graft-one"


def returns_info(arguments):
    return f"@hookimpl\ndef kernelgraft_info(): return PluginInfo({arguments})"


BROKEN = {
    "raises": ("1 / 0", "ZeroDivisionError"),
    "imports-nothing": ("import no_such_module", "No module named 'no_such_module'"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "has-no-info": ("", "has no kernelgraft_info"),
    "is-unmarked": ("def kernelgraft_info(): pass", "kernelgraft_info is not marked with @hookimpl"),
    "misnamed": (returns_info("'other', ''"), "calls itself 'other'"),
    "unknown-hook": ("@hookimpl\ndef kernelgraft_inform(): pass", "unknown hook 'kernelgraft_inform'"),
    "wrong-arguments": ("@hookimpl\ndef kernelgraft_apply(patchset): pass", "patchset"),
    "no-tuple": (
        returns_info("'no-tuple', '', hosts=(HostRequirement('h', ('h',), ''))"),
        "expected a tuple of HostRequirement",
    ),
    "no-range": (
        returns_info("'no-range', '', hosts=(HostRequirement('h', ('h',), 'new'),)"),
        "Invalid specifier: 'new'",
    ),
    "string": (
        returns_info("'string', '', hosts=(HostRequirement('h', 'h', '>1'),)"),
        "are 'h', expected a tuple",
    ),
    "info-raises": ("@hookimpl\ndef kernelgraft_info(): return {}['gone']", "KeyError: 'gone'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_breaks_nothing_else(site, manager, host, name):
    source, message = BROKEN[name]
    site.plugin(name, source)
    manager = Manager()
    with pytest.raises(PluginError, match=f"'{name}' from {name}-dist") as caught:
        manager.load(name, {})
    assert message in str(caught.value)
    rows = {row.name: row for row in manager.status()}
    assert message in rows[name].error
    assert rows["graft-one"].error is None
    with manager.load("graft-one", {}):
        assert host.VALUE == "graft-one"


def test_the_cause_of_a_broken_plugin_is_chained(site):
    site.plugin("raises", "1 / 0")
    with pytest.raises(PluginError) as caught:
        Manager().load("raises", {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_plugins_are_not_imported_until_asked_for(site, manager):
    site.plugin("raises", "1 / 0")
    Manager().load("graft-one", {}).unload()
    assert "plugin_raises" not in sys.modules


def test_an_unknown_name_lists_the_known_ones(manager):
    with pytest.raises(PluginNotFound, match=r"plugin 'grafted' is not installed; known: .*graft-one"):
        manager.load("grafted", {})


@pytest.mark.parametrize(
    ("allowed", "seen"), [("graft_one", ["graft-one"]), ("", []), (" graft-one , gone", ["graft-one"])]
)
def test_the_allow_list_hides_every_other_plugin(site, manager, monkeypatch, allowed, seen):
    site.plugin("hidden", "raise AssertionError('imported')")
    manager = Manager()
    monkeypatch.setenv("KERNELGRAFT_PLUGINS", allowed)
    assert [row.name for row in manager.status()] == seen
    with pytest.raises(PluginNotFound, match="'hidden' is hidden by KERNELGRAFT_PLUGINS="):
        manager.load("hidden", {})
    assert manager.unknown_names() == (["gone"] if "gone" in allowed else [])


def test_two_distributions_with_one_name_are_told(site, manager, host):
    site.distribution("zz-copycat", plugins={"graft_one": "plugin_copycat"})
    manager = Manager()
    rows = [row for row in manager.status() if row.name == "graft-one"]
    assert [row.error for row in rows if row.distribution == "zz-copycat"] == [
        "the name is taken by the plugin from graft-one-dist"
    ]
    with manager.load("graft-one", {}):
        assert host.VALUE == "graft-one"


def test_an_engine_gets_third_party_plugins_only_by_name(site, host, monkeypatch, caplog):
    site.plugin("twice", TWO_HOSTS)
    site.host("fakeengine", "1.0")
    manager = Manager()
    assert manager.graft_onto("fakeengine") == []
    assert "plugin_twice" not in sys.modules
    monkeypatch.setenv("KERNELGRAFT_PLUGINS", "awq,twice,broken")
    assert [handle.info.name for handle in manager.graft_onto("fakeengine")] == ["twice"]


def test_an_engine_gets_kernels_only_from_a_plugin_named_for_it(site, monkeypatch):
    info = "@hookimpl\ndef kernelgraft_info():\n    return PluginInfo('just-kernels', 'for a test')\n"
    site.plugin("just-kernels", info + KERNELS.format(op="w4a16_linear"))
    manager, backends = Manager(), kernel_backends()
    assert manager.graft_onto("fakeengine") == []
    monkeypatch.setenv("KERNELGRAFT_PLUGINS", "just-kernels")
    (handle,) = manager.graft_onto("fakeengine")
    assert kernel_backends() == ("fake", *backends)
    assert [row.loaded for row in manager.status()] == [("-",)]
    handle.unload()
    assert kernel_backends() == backends


def test_what_an_engine_cannot_get_is_logged_and_left_out(site, monkeypatch, caplog):
    site.plugin("twice", TWO_HOSTS)
    site.plugin("broken", "1 / 0")
    site.host("fakeengine", "0.1")
    monkeypatch.setenv("KERNELGRAFT_PLUGINS", "twice,broken")
    with caplog.at_level(logging.ERROR, logger="kernelgraft"):
        assert Manager().graft_onto("fakeengine") == []
    messages = sorted(record.getMessage() for record in caplog.records)
    assert "fakeengine 0.1 is outside the tested range" in messages[1]
    assert "ZeroDivisionError" in messages[0]
    assert "fakeengine" not in sys.modules


def test_checks_of_a_plugin_that_raise_are_checks_that_failed(site, host):
    site.plugin("graft-one", GRAFT.format(name="graft-one") + "@hookimpl\ndef kernelgraft_doctor(): 1 / 0\n")
    (check,) = Manager().examine("graft-one")
    assert not check.ok
    assert "ZeroDivisionError" in check.detail
