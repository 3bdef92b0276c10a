"""Commands that ask this host's agent, and a move by hand, on real agents with switches in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from datapath.state.drops import NAMES
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context
from migrator.cli.main import cli, run
from migrator.cli.port import fullness, sentence
from migrator.cli.trace import line
from tests.unit.pair import MACS, VM, World, eventually, world


class Shell:
    """Runs commands in a thread, as an operator at host `host` would."""

    def __init__(self, w: World, capsys: pytest.CaptureFixture[str]) -> None:
        self._w, self._capsys = w, capsys

    async def __call__(self, *arguments: str, code: int = 0, host: str = "a") -> str:
        options = ("--coordinator", self._w.address, "--agent", str(self._w.directory / f"{host}.sock"))
        got = await asyncio.wait_for(asyncio.to_thread(run, [*options, *arguments]), 30)
        out, err = self._capsys.readouterr()
        assert got == code, out + err
        return out if not code else out + err

    async def json(self, *arguments: str, host: str = "a"):
        return json.loads(await self(*arguments, "--json", host=host))


@pytest.fixture
def play(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

    def play(scenario: Callable[[World, Shell], Awaitable[None]]) -> None:
        async def main() -> None:
            async with world(tmp_path, "a", "b") as w:
                await scenario(w, Shell(w, capsys))

        asyncio.run(main())

    yield play
    structlog.reset_defaults()


def test_vm_is_moved_by_hand(play) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        w.fill("a", 500)
        out = await shell("migrate", VM, "--to", "b")
        assert "outcome      complete" in out
        assert "stopped by   agent" in out
        assert "connections  1,000 moved, 0 not moved" in out
        assert "until its state was at the destination" in out
        assert "conntrack  1,000" in out
        report = (await shell.json("migration", "list"))[0]
        assert report["moved"]["conntrack"] == 1000 and report["done"]
        assert (await shell.json("vm", "show", VM, host="b"))["instances"][0]["instance"]["state"] == "active"
        await w.quiet()
        assert (await shell.json("vm", "show", VM))["instances"] == []
        assert "has no port on a" in await shell("acl", "show", VM, code=12)

    play(scenario)


def test_ports_are_shown_with_what_the_agent_counts(play) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        w.fill("a", 7)
        port, _ = await shell.json("port", "show", VM)
        assert port["status"]["instance"]["epoch"] == 1
        text = await shell("port", "show", MACS[0])
        assert "state" in text and "active" in text and "tap1" in text
        rules = await shell.json("acl", "show", VM)
        assert [(rule["mac"], rule["ports"], rule["hits"]) for rule in rules] == [(mac, [[22, 22]], 0) for mac in MACS]
        assert "22" in await shell("acl", "show", MACS[0])

    play(scenario)


def test_drops_are_shown_with_what_they_mean(play) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        ref = next(ref for ref in w.active("a") if ref.mac == MACS[0])
        w.driver("a")._port(ref).drops.update({"spoof-mac": 3})
        text = await shell("port", "show", MACS[0])
        assert "spoof-mac        3       The source MAC is not one of the port's." in text
        assert (await shell.json("port", "show", MACS[0]))[0]["status"]["drops"] == {"spoof-mac": 3}

    play(scenario)


@pytest.mark.parametrize(
    ("connections", "shown"),
    [
        (79, "79 of 100"),
        (80, "80 of 100, nearly full: raise connections_max (alarm from 80 %)"),
    ],
)
def test_a_table_that_is_nearly_full_is_said_to_be(connections: int, shown: str) -> None:
    assert fullness(connections, 100) == shown


def test_a_reason_of_a_newer_switch_has_no_sentence() -> None:
    assert sentence("reason-99") == ""
    assert all(sentence(name) for name in NAMES)


def test_connections_are_listed(play) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        w.fill("a", 3)
        lines = (await shell("conntrack", "list", MACS[0])).splitlines()
        assert len(lines) == 3
        assert all(line.startswith("tcp ESTABLISHED [::]:0 -> ") for line in lines)
        records = [json.loads(line) for line in (await shell("conntrack", "list", VM, "--json")).splitlines()]
        assert [record["mac"] for record in records].count(MACS[1]) == 3

    play(scenario)


def test_checkpoint_inspect_and_restore(play, tmp_path: Path) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        w.fill("a", 20)
        before = w.connections("a")
        file = tmp_path / "vm.mgs"
        assert (await shell.json("checkpoint", VM, "-o", str(file)))["bytes"] == file.stat().st_size
        assert (await shell.json("inspect", str(file)))["ports"][MACS[0]]["conntrack"] == 20
        for mac in MACS:
            await shell("port", "del", mac)
        await eventually(lambda: not w.statuses("a"))
        devices = [f"--device={mac}=tap{i}" for i, mac in enumerate(MACS, 1)]
        assert "conntrack  40" in await shell("restore", str(file), *devices, host="b")
        assert w.connections("b") == before
        again = tmp_path / "again.mgs"
        await shell("checkpoint", VM, "-o", str(again), host="b")
        ages = ("--ignore", "age_ns", "--no-accounting")
        assert await shell("diff", str(file), str(again), *ages) == ""

    play(scenario)


def test_damaged_snapshot_restores_nothing(play, tmp_path: Path) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        file = tmp_path / "vm.mgs"
        await shell("checkpoint", VM, "-o", str(file))
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
        said = await shell("restore", str(file), code=21, host="b")
        assert "section" in said or "byte" in said
        assert "byte" in await shell("inspect", str(file), code=21)
        assert not w.statuses("b")
        assert not list(tmp_path.glob(".*.mgs*"))

    play(scenario)


def test_checkpoint_that_fails_leaves_no_file(play, tmp_path: Path) -> None:
    async def scenario(_: World, shell: Shell) -> None:
        file = tmp_path / "vm.mgs"
        await shell("checkpoint", VM, "-o", str(file), code=12, host="b")
        assert [path.name for path in tmp_path.iterdir() if "mgs" in path.name] == []

    play(scenario)


def test_frames_are_traced(play) -> None:
    async def scenario(w: World, shell: Shell) -> None:
        frame = (
            bytes(12)
            + bytes.fromhex("ffffffffffff")
            + bytes.fromhex(MACS[0].replace(":", ""))
            + b"\x88\xb5"
            + bytes(46)
        )
        tracing = asyncio.create_task(shell("trace", MACS[0], "--count", "1", "--json"))
        ref = next(ref for ref in w.active("a") if ref.mac == MACS[0])
        await eventually(lambda: bool(w.agents["a"].traces._lookers))
        while not tracing.done():
            w.driver("a").inject(ref, [frame], judged=False)
            await asyncio.sleep(0.02)
        record = json.loads(await tracing)
        assert (record["mac"], record["direction"]) == (MACS[0], "from")
        assert abs(record["time"] - time.time()) < 60
        shown = line(pb.TraceEvent(**(record | {"frame": frame[12:]})))
        assert f"{MACS[0]} from pass" in shown and "ff:ff:ff:ff:ff:ff, ethertype 0x88b5" in shown

    play(scenario)


def test_shell_completes_hosts(play) -> None:
    async def scenario(w: World, _: Shell) -> None:
        from migrator.cli.context import complete

        command = cli.get_command(None, "migrate")
        ctx = command.make_context("migrate", [], resilient_parsing=True, obj=Context(w.address))
        assert await asyncio.to_thread(complete("host"), ctx, command.params[0], "") == ["a", "b"]

    play(scenario)


def test_port_added_later_is_seen_beside_the_others_and_removed_alone(play) -> None:
    """Its epoch is a later one than theirs."""

    async def scenario(w: World, shell: Shell) -> None:
        await shell("port", "add", *f"--vm {VM} --mac 52:54:00:00:00:03 --network blue --device tap3".split())
        await eventually(lambda: len(w.active("a")) == 3)
        assert {ref.mac: ref.epoch for ref in w.active("a")} == {**dict.fromkeys(MACS, 1), "52:54:00:00:00:03": 2}
        await shell("acl", "add", "web", "--direction", "from", "--action", "allow")
        w.fill("a", 1)
        assert len((await shell("conntrack", "list", VM)).splitlines()) == 3
        await shell("port", "del", "52:54:00:00:00:03")
        await eventually(lambda: len(w.active("a")) == 2)
        for ref in w.active("a"):
            w.driver("a").purge(ref)  # as a host that was set up anew
        await w.stop("a")
        await w.start("a")
        await eventually(lambda: {ref.mac for ref in w.active("a")} == set(MACS))

    play(scenario)
