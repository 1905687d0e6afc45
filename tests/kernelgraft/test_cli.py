"""The command line: exit codes, errors in one sentence, and a quick start."""

import json
import subprocess
import sys

import pytest

import kernelgraft
from kernelgraft.cli import main


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code or 0


@pytest.fixture
def failing_list(monkeypatch):
    def fail(error):
        def plugins():
            raise error

        monkeypatch.setattr(kernelgraft, "plugins", plugins)

    return fail


def test_list_shows_plugins_their_hosts_and_what_is_broken(site, fresh_manager, capsys, monkeypatch):
    site.plugin("raises", "1 / 0")
    monkeypatch.setenv("COLUMNS", "200")
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "awq" in out
    assert "transformers" in out
    assert "ZeroDivisionError" in out


def test_doctor_prints_json_and_fails_when_a_plugin_is_broken(site, fresh_manager, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    healthy = run("doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    failed = [check for plugin in report["plugins"] for check in plugin["checks"] if not check["ok"]]
    assert healthy == (1 if failed else 0)

    site.plugin("raises", "1 / 0")
    from kernelgraft.manager import _made

    _made.cache_clear()
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert "plugin 'raises' from raises-dist" in out
    assert "w4a16_linear" in out


@pytest.mark.parametrize(
    "error",
    [kernelgraft.PluginError("it is\nbroken"), ValueError("it is  broken"), OSError("it is broken")],
)
def test_an_error_is_one_sentence_without_a_traceback(failing_list, capsys, error):
    failing_list(error)
    assert run("list") == 1
    captured = capsys.readouterr()
    assert captured.err == "kernelgraft: it is broken\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [("--debug", "list"), ("list", "--debug")])
def test_debug_raises_the_error_wherever_it_stands(failing_list, arguments):
    failing_list(ValueError("it is broken"))
    with pytest.raises(ValueError, match="it is broken"):
        main(arguments)


def test_a_bug_keeps_its_traceback(failing_list):
    failing_list(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["list"])


@pytest.mark.parametrize("arguments", [("lists",), ("list", "--colour"), ("doctor", "extra")])
def test_wrong_usage_exits_with_two(arguments, capsys):
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_help_starts_neither_torch_nor_a_host():
    script = """
import sys
from kernelgraft.cli import main
try:
    main(["--help"])
except SystemExit:
    print(*{"torch", "transformers", "vllm", "numpy"} & sys.modules.keys(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout
    assert done.stderr.strip() == ""
