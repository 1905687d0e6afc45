"""``kernelgraft list`` and ``kernelgraft doctor``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .console import console, escape, table


def list_plugins() -> None:
    """List the installed plugins and their hosts.

    Example: [bold]kernelgraft list[/]
    """
    import kernelgraft

    shown = table("plugin", "hosts", "from", "summary")
    rows = kernelgraft.plugins()
    for row in rows:
        summary = f"[red]{escape(row.error)}[/]" if row.error or row.info is None else escape(row.info.summary)
        hosts = "\n".join(f"{host.module} {_found(host.version, host.ok)}" for host in row.hosts)
        shown.add_row(row.name, hosts or "any", row.distribution, summary)
    console().print(shown if rows else "no plugins: KERNELGRAFT_PLUGINS hides them, or kernelgraft is not installed")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Examine this machine: versions, hosts, plugins, the backend of every op and why, GPUs, tips.

    Exits with 1 when a plugin is broken or one of its checks fails.

    Examples: [bold]kernelgraft doctor[/], [bold]kernelgraft doctor --json > report.json[/]
    """
    import kernelgraft
    from kernelgraft.diagnosis import broken_plugins

    report = kernelgraft.doctor()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)
    if broken_plugins(report):
        raise typer.Exit(1)


def _print_report(report: dict[str, Any]) -> None:
    out = console()
    libraries = ", ".join(f"{name} {version or 'missing'}" for name, version in report["libraries"].items())
    cpu = report["cpu"]
    gpus = [
        f"{gpu['name']} ({'.'.join(map(str, gpu['capability']))}, {gpu['memory'] / 2**30:.0f} GiB)"
        for gpu in report["gpus"]
    ]
    out.print(f"[bold]kernelgraft {report['kernelgraft']}[/], Python {report['python']}, {report['platform']}")
    out.print(escape(libraries))
    out.print(escape(f"CPU: {cpu['model']}, {cpu['cores']} cores, torch uses {cpu['torch_capability']}"))
    out.print(f"GPU: {escape(', '.join(gpus) or 'none')}")
    out.print(f"C compiler (for Triton on a GPU): {escape(report['c_compiler'] or 'none')}")
    for name, value in report["environment"].items():
        out.print(escape(f"{name}={value}"))

    rows = table("host", "found", "tested range", "for")
    for host in report["hosts"]:
        found = _found(f"{host['distribution']} {host['version']}" if host["version"] else None, host["ok"])
        rows.add_row(host["module"], found, host["specifier"], ", ".join(host["plugins"]))
    out.print(rows)

    rows = table("plugin", "from", "loaded onto", "changes", "checks")
    for plugin in report["plugins"]:
        failed = [f"{check['what']}: {check['detail']}" for check in plugin["checks"] if not check["ok"]]
        verdict = plugin["error"] or "\n".join(failed)
        passed = f"{_mark(True)} {len(plugin['checks'])} passed"
        rows.add_row(
            plugin["name"],
            plugin["distribution"],
            ", ".join(plugin["loaded"]) or "not loaded",
            "\n".join(map(escape, plugin["patches"])),
            f"{_mark(False)} {escape(verdict)}" if verdict else passed,
        )
    out.print(rows)

    rows = table("op", "device", "backend", "verdict")
    for row in report["ops"]:
        style = {"runs": "green", "ready": "default"}.get(row["verdict"], "yellow")
        rows.add_row(row["op"], row["device"], row["backend"], f"[{style}]{escape(row['verdict'])}[/]")
    out.print(rows)
    for tip in report["tips"]:
        out.print(f"[yellow]tip:[/] {escape(tip)}")


def _found(version: str | None, ok: bool) -> str:
    return f"{_mark(ok)} {escape(version)}" if version else "[dim]not installed[/]"


def _mark(ok: bool) -> str:
    return "[green]✓[/]" if ok else "[red]✗[/]"
