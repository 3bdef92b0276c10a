"""`migrator libvirt`: libvirt's hook and lock driver on this host, and which of its domains are ours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from datapath.errors import Error, FeatureMissing
from migrator.cli.context import Context, Group, pass_context
from migrator.errors import exit_code
from migrator.table import print_fields, print_json, print_table

_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_directory = click.option(
    "--directory",
    type=_DIRECTORY,
    default=Path("/etc/libvirt/hooks"),
    show_default=True,
    help="libvirt's directory of hooks.",
)
_lock_drivers = click.option(
    "--lock-drivers", type=_DIRECTORY, default=None, help="libvirt's directory of lock drivers; found by itself."
)
_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
RESTART = "libvirtd has to be restarted: systemctl restart libvirtd (virtqemud where it runs); VMs go on"
RELOAD = "systemctl reload libvirtd (virtqemud where it runs), or `migrator libvirt install --reload`"


@click.group(cls=Group)
def libvirt() -> None:
    """libvirt's hook and lock driver on this host."""


@libvirt.command()
@_directory
@_lock_drivers
@_dry_run
@click.option("--strict", is_flag=True, help="Also libvirt's lock driver, which strict moves need, and qemu.conf.")
@click.option("--reload", "reload_daemons", is_flag=True, help="Have libvirt's daemons look for hooks again (SIGHUP).")
@pass_context
def install(
    context: Context, directory: Path, lock_drivers: Path | None, dry_run: bool, strict: bool, reload_daemons: bool
) -> None:
    """Put the hook where libvirt runs it. Other hooks stay as they are and are run as well."""
    from migrator.agent.libvirt import installation, lockdriver

    changed = installation.install(directory, dry_run=dry_run)
    blind = [daemon for daemon in installation.daemons(directory) if not daemon.sees]
    if reload_daemons and not dry_run:
        for daemon in blind:
            installation.reload(daemon)
    notes = _notes(directory)
    if strict:
        place = lock_drivers or lockdriver.directory()
        made = lockdriver.install(place, _qemu_conf(directory), dry_run=dry_run)
        notes.append(_done(place / lockdriver.FILE, made, "installed" if not dry_run else "would be installed"))
        if not dry_run and lockdriver.missing():
            notes.append(RESTART)
    if blind:
        done = "told to look again" if reload_daemons and not dry_run else f"does not look for hooks yet: {RELOAD}"
        notes += [f"{daemon.name} (process {daemon.pid}) {done}" for daemon in blind]
    _say(context, installation.target(directory), changed, "installed" if not dry_run else "would be installed", notes)


def _qemu_conf(directory: Path) -> Path:
    """Beside the directory of hooks."""
    return directory.parent / "qemu.conf"


@libvirt.command()
@_directory
@_lock_drivers
@_dry_run
@pass_context
def uninstall(context: Context, directory: Path, lock_drivers: Path | None, dry_run: bool) -> None:
    """Remove hook and lock driver. VMs that run go on; those with ports of ours no longer wait for the agent."""
    from migrator.agent.libvirt import installation, lockdriver

    changed = installation.uninstall(directory, dry_run=dry_run)
    word, notes = "removed" if not dry_run else "would be removed", []
    try:
        place = lock_drivers or lockdriver.directory()
    except FeatureMissing:
        place = None  # no libvirt, no lock driver
    if place is not None and lockdriver.uninstall(place, _qemu_conf(directory), dry_run=dry_run):
        notes = [_done(place / lockdriver.FILE, True, word), RESTART]
    _say(context, installation.target(directory), changed, word, notes)


def _say(context: Context, path: Path, changed: bool, word: str, notes: list[str]) -> None:
    if context.json:
        print_json({"path": str(path), "changed": changed, "notes": notes})
        return
    click.echo(_done(path, changed, word))
    for note in notes:
        click.echo(f"  {note}")


def _done(path: Path, changed: bool, word: str) -> str:
    return f"{path}: {word if changed else 'nothing to do'}"


def _notes(directory: Path) -> list[str]:
    from migrator.agent.libvirt import installation

    found = []
    for path in installation.others(directory):
        text = path.read_bytes()
        twice = " and may call ours a second time, which does no harm" if b"qemu.d" in text else ""
        found.append(f"{path} is run as well{twice}")
    return found


@libvirt.command()
@_directory
@click.option("--uri", default="qemu:///system", show_default=True, help="libvirt's.")
@pass_context
def status(context: Context, directory: Path, uri: str) -> int:
    """Is the hook there and seen, does the agent answer, and which domains are ours?"""
    body = _look(directory, uri)
    if context.json:
        print_json(body)
    else:
        _print(body)
    return 0 if not body["problems"] else exit_code(FeatureMissing(""))


def _look(directory: Path, uri: str) -> dict[str, Any]:
    from migrator.agent.libvirt import installation, lockdriver

    problems: list[str] = []
    state = installation.state(directory)
    if state != "current":
        problems.append(f"the hook is {state}: `migrator libvirt install`")
    agent = _agent(problems)
    daemons = installation.daemons(directory)
    if not agent.get("hooks"):
        problems += [f"{d.name} (process {d.pid}) looks for no hooks yet: {RELOAD}" for d in daemons if not d.sees]
    named = lockdriver.configured(_qemu_conf(directory))
    missing = lockdriver.missing()
    if named == lockdriver.NAME and missing:
        problems.append(f"{missing}: {RESTART}")
    domains = _domains(uri, problems)
    problems += [text for domain in domains for text in domain["refused"]]
    return {
        "hook": {"path": str(installation.target(directory)), "state": state},
        "lock": {"manager": named, "loaded": not missing},
        "others": [str(path) for path in installation.others(directory)],
        "daemons": [asdict(daemon) for daemon in daemons],
        "agent": agent,
        "domains": domains,
        "problems": problems,
    }


def _agent(problems: list[str]) -> dict[str, Any]:
    from migrator.agent.libvirt import installation

    path = installation.hook_socket()
    try:
        return {"socket": str(path), **installation.ask_agent(path)}
    except Error as error:
        problems.append(str(error))
        return {"socket": str(path), "ok": False}


def _domains(uri: str, problems: list[str]) -> list[dict[str, Any]]:
    try:
        from migrator.agent.libvirt.survey import survey

        return [asdict(domain) for domain in survey(uri)]
    except ImportError as error:
        problems.append(f"libvirt's domains cannot be asked for: {error} (install libvirt-python)")
    except Error as error:
        problems.append(str(error))
    return []


def _print(body: dict[str, Any]) -> None:
    agent = body["agent"]
    answers = f"{agent['socket']}: {'answers' if agent['ok'] else 'does not answer'}"
    if agent["ok"]:
        answers += f", host {agent.get('host')}, asked by the hook {agent.get('hooks')} times since its start"
    seen = [f"{d['name']} {d['pid']}{'' if d['sees'] else ' (started before the hook)'}" for d in body["daemons"]]
    hook = body["hook"]
    print_fields(
        {
            "hook": f"{hook['path']}: {hook['state']}",
            "other hooks": ", ".join(body["others"]),
            "lock manager": f"{body['lock']['manager'] or 'none'}{', loaded' if body['lock']['loaded'] else ''}",
            "daemons": ", ".join(seen),
            "agent": answers,
        }
    )
    if body["domains"]:
        click.echo()
        rows = [(d["name"], d["uuid"], d["running"], list(d["ports"]), len(d["refused"])) for d in body["domains"]]
        print_table(("DOMAIN", "UUID", "RUNS", "PORTS", "REFUSED"), rows)
    for problem in body["problems"]:
        click.echo(f"problem: {problem}")
