# SPDX-License-Identifier: GPL-2.0-only
"""docs/labels.md, followed: its rules, its commands, and what it says that these show and do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from migrator.lab.machines import Machine
from migrator.lab.processes import Worker, wait_until

from .test_watch import watching
from .world import World

PAGE = Path(__file__).parents[2] / "docs" / "labels.md"
SSH, WEB, OTHER = 22, 443, 8080


class Reader:
    """Somebody who types what stands on the page, with a VM and a peer of their own."""

    def __init__(self, world: World, vm: Machine, peer: Machine) -> None:
        names = {"web-1": vm.name, "198.51.100.7": peer.address, "198.51.100.0/24": f"{peer.address}/32"}
        text = PAGE.read_text()
        for theirs, own in names.items():
            assert theirs in text, f"{theirs} is no longer on the page"
            text = text.replace(theirs, own)
        self.world, self.vm, self.text = world, vm, text

    def block(self, sort: str) -> str:
        found = re.search(rf"^```{sort}\n(.*?)^```", self.text, flags=re.M | re.S)
        assert found, f"no {sort} on the page"
        return found[1]

    def run(self, command: str | Sequence[str]) -> str:
        words = shlex.split(command) if isinstance(command, str) else command
        assert words[0] == "migrator"
        ran = self.world.cluster.cli(*words[1:], host=self.vm.place())
        assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        return ran.stdout


def connected(peer: Machine, vm: Machine, port: int) -> Worker:
    vm.worker("tcp").call("listen", address="0.0.0.0", port=port)
    client = peer.worker("tcp")
    assert client.call("connect", address=vm.address, port=port, count=1, timeout_s=20)["connected"] == 1
    return client


def lost(client: Worker) -> bool:
    return bool(client.call("check", size=10, timeout_s=1.0)["lost"])


def test_the_page_followed(world: World) -> None:
    world.cluster.apply(policies=[{"name": "web"}])
    vm, peer = world.vm("h1", policy="web"), world.peer("h3")
    reader = Reader(world, vm, peer)
    rules = world.cluster.directory / "labels.yaml"
    rules.write_text(reader.block("yaml"))
    reader.run(["migrator", "apply", "-f", str(rules)])
    shell = connected(peer, vm, SSH)
    shown, expected = (one.splitlines() for one in (reader.run(f"migrator conntrack list {vm.name}"), page(reader, 0)))
    assert shape(shown) == shape(expected)
    marked = ("--kind", "conntrack", "--vm", vm.name, "--match", "mark=0xbad")
    with watching(world, world.cluster.directory / "marked", *marked, "--interval", "0.2") as watch:
        wait_until("the watch is current", watch.current, 30.0, explain=watch.said)
        assert reader.run(command(reader, 1)) == page(reader, 1)
        wait_until("it is told", lambda: watch.ops("conntrack", "added"), explain=watch.said)
        (told,) = watch.ops("conntrack", "added")
        assert (told["record"]["mark"], int(told["record"]["label"], 16)) == (0xBAD, 1)
    wait_until("the first rule ends it", lambda: lost(shell))
    assert reader.run(f"migrator conntrack list {vm.name}") == ""
    web = connected(peer, vm, WEB)
    assert "mark=0x7" in reader.run(f"migrator conntrack list {vm.name}")
    world.move(vm, "h2")
    assert "mark=0x7" in reader.run(f"migrator conntrack list {vm.name}") and not lost(web)
    (added,) = re.findall(r"`(migrator acl add [^`]+)`", reader.text)
    reader.run(added)
    assert "label=0x1/0x1" in reader.run("migrator acl show web").splitlines()[-1]


def lines(reader: Reader) -> list[tuple[str, str]]:
    """Commands of the page, each with what it prints there."""
    parts = re.split(r"^\$ ", reader.block("console"), flags=re.M)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def command(reader: Reader, number: int) -> str:
    return lines(reader)[number][0]


def page(reader: Reader, number: int) -> str:
    return lines(reader)[number][1]


def shape(shown: list[str]) -> list[str]:
    """Lines up to what is counted, with the page's own port for any."""
    return [re.sub(r":\d{4,5} ", ":PORT ", one.partition(" from ")[0].split(" ", 3)[3]) for one in shown]
