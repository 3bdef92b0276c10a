# SPDX-License-Identifier: GPL-2.0-only
"""`migrator watch` against a real cluster with switches in memory: filters, commands for changes, a slow reader."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from datapath.state.kind import Table
from migrator._pb import migrator_pb2 as pb
from migrator.agent import watchers
from migrator.cli import following
from migrator.cli.following import Wanted, Ways, follow
from migrator.cli.main import run
from migrator.security.transport import PLAIN
from tests.unit.pair import MACS, VM, World, connections, world

DEADLINE_S = 30.0
STATE = ("watch", "--kind", "conntrack", "--mac", MACS[0], "--interval", "0.1")


class Served:
    """A cluster in a thread of its own, for commands that call it as a process would."""

    def __init__(self, directory: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._stack = AsyncExitStack()
        self.world: World = self.do(self._stack.enter_async_context(world(directory, "a", "b")))

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    def load(self, count: int, first: int = 0, **columns: Any) -> None:
        """Connections of the first port, wherever it is."""

        async def load() -> None:
            host = "a" if self.world.active("a") else "b"
            ref = self.world.active(host)[0]
            made = connections(count, first)
            for name, value in columns.items():
                made[name][:] = value
            self.world.driver(host).load(ref, Table("conntrack", columns=made))

        self.do(load())

    def close(self) -> None:
        self.do(self._stack.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    made = Served(tmp_path)
    monkeypatch.setenv("MIGRATOR_COORDINATOR", made.world.address)
    monkeypatch.setenv("MIGRATOR_AGENT", str(tmp_path / "a.sock"))
    yield made
    made.close()
    structlog.reset_defaults()


class Later:
    """Does things while a watch runs in the main thread: each when the one before has been seen."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = steps
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for step in self._steps:
                step()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> Later:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive() and not self._errors, self._errors


def watched(served: Served, count: int = 1) -> Callable[[], None]:
    """Wait until the agent has looked for so many watches."""

    def wait() -> None:
        deadline = time.monotonic() + DEADLINE_S
        watching = served.world.agents["a"].watching
        while not (len(watching) >= count and any(vm.contents for vm in watching._vms.values())):
            assert time.monotonic() < deadline, "nobody watches"
            threading.Event().wait(0.01)

    return wait


def printed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_snapshot_is_printed_for_people_and_for_programs(served: Served, capsys: Any) -> None:
    served.load(3)
    assert run([*STATE, "--snapshot", "--json"]) == 0
    lines = printed(capsys)
    assert [line["op"] for line in lines] == ["arrived" for _ in ()] + ["added"] * 3 + ["current"]
    assert lines[0]["vm"] == VM and lines[0]["host"] == "a" and all(line["snapshot"] for line in lines)
    assert run([*STATE, "--snapshot", "--match", "rport=1-2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and f"{VM} {MACS[0]} conntrack is: tcp ESTABLISHED" in shown[0]
    assert run([*STATE, "--snapshot", "--here", "--vm", VM, "--json"]) == 0
    assert [line["op"] for line in printed(capsys)] == ["added"] * 3 + ["current"]
    assert run(["watch", "--kind", "port", "--kind", "acl", "--mac", MACS[0], "--snapshot", "--json"]) == 0
    assert Counter(line["kind"] for line in printed(capsys)) == {"port": 2, "acl": 1, "": 1}


def test_only_changes_of_the_operations_that_are_asked_for(served: Served, capsys: Any) -> None:
    served.load(3)
    change = partial(served.load, 1, state=7)
    with Later(watched(served), change, partial(served.load, 2, 10)):
        assert run([*STATE, "--op", "changed", "--count", "1", "--json"]) == 0
    (line,) = printed(capsys)
    assert (line["op"], line["was"], line["record"]["rport"]) == ("changed", {"state": "ESTABLISHED"}, 0)
    with Later(watched(served), partial(served.load, 2, 20)):
        assert run([*STATE, "--added", "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("conntrack added: tcp ESTABLISHED" in line for line in lines)


def test_a_command_has_the_change_on_its_input_and_in_its_environment(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        f'{{ cat; echo "$MIGRATOR_OP $MIGRATOR_KIND $MIGRATOR_HOST $MIGRATOR_MAC $MIGRATOR_RECORD_RPORT"; }} >> {out}'
    )
    served.load(2)
    with Later(watched(served), partial(served.load, 3, 100)):
        assert run([*STATE, "--shell", "--exec", script, "--count", "3"]) == 0
    lines = out.read_text().splitlines()
    assert [json.loads(line)["record"]["rport"] for line in lines[::2]] == [100, 101, 102]
    assert lines[1::2] == [f"added conntrack a {MACS[0]} {port}" for port in (100, 101, 102)]
    assert run([*STATE, "--shell", "--exec", f"echo $MIGRATOR_RECORD_RPORT >> {out}.2", "--initial", "--snapshot"]) == 0
    assert (tmp_path / "out.2").read_text().split() == ["0", "1", "100", "101", "102"]


def test_no_shell_reads_a_command_unless_it_is_asked_for(served: Served, tmp_path: Path, capfd: Any) -> None:
    served.load(1)
    command = f"printf '%s|' '$MIGRATOR_OP;' >{tmp_path}/x $(id) 'two words'"
    assert run([*STATE, "--exec", command, "--initial", "--snapshot"]) == 0
    assert capfd.readouterr().out == f"$MIGRATOR_OP;|>{tmp_path}/x|$(id)|two words|"
    assert not (tmp_path / "x").exists()


def test_a_command_that_fails_is_named_and_may_end_the_watch(served: Served, capsys: Any) -> None:
    served.load(3)
    fail = [*STATE, "--initial", "--snapshot", "--shell", "--exec", "exit $((3 + MIGRATOR_RECORD_RPORT))"]
    assert run(fail) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split("exit code ")[1][0] for line in warnings] == ["3", "4", "5"]
    assert all("conntrack is: tcp" in line for line in warnings)
    assert run([*fail, "--on-failure", "stop"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ended with exit code 3" in line and "--on-failure go-on" in line
    assert run([*fail[:-1], "kill -9 $$", "--on-failure", "stop"]) == 1
    assert "ended by signal 9" in capsys.readouterr().err


def test_commands_run_one_after_the_other_or_side_by_side(served: Served, tmp_path: Path) -> None:
    served.load(4)
    there = f"[ $(ls {tmp_path} | grep -c met) -ge 4 ]"
    meet = f"touch {tmp_path}/$MIGRATOR_RECORD_RPORT.met; timeout 20 sh -c 'until {there}; do sleep 0.05; done'"
    all_ = [*STATE, "--initial", "--snapshot", "--on-failure", "stop", "--shell", "--exec"]
    assert run([*all_, meet, "--jobs", "4"]) == 0
    alone = f"mkdir {tmp_path}/alone && rmdir {tmp_path}/alone && echo $MIGRATOR_RECORD_RPORT >> {tmp_path}/order"
    assert run([*all_, alone]) == 0
    assert (tmp_path / "order").read_text().split() == ["0", "1", "2", "3"]


def test_a_slow_reader_loses_nothing_in_silence(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not read is told so, and in the end of all that is there."""
    monkeypatch.setattr(watchers, "BACKLOG_MAX", 10_000)
    monkeypatch.setattr(following, "WAITING_MAX", 1)
    request = pb.StateRequest(kinds=["conntrack"], macs=[MACS[0]], interval_s=0.1)
    changes = follow(Wanted(request, mac=MACS[0]), Ways(PLAIN, coordinator=served.world.address), lambda _: None)
    there: set[int] = set()
    try:
        for change, _ in changes:
            if change.op == "current":
                break
        looks = served.world.agents["a"].watching._vms[VM]
        total = 0
        deadline = time.monotonic() + DEADLINE_S
        for count in (4_000, 4_000, 4_000, 11_000, 100):
            served.load(count, total)
            total += count
            due = looks.due
            while looks.due == due:
                assert time.monotonic() < deadline
                threading.Event().wait(0.01)
        lost = False
        for change, _ in changes:
            lost = lost or change.op == "lost"
            if change.op == "added":
                assert change.record["id"] not in there
                there.add(change.record["id"])
            assert change.op in ("added", "lost", "arrived"), change
            if len(there) == total:
                break
        assert lost
    finally:
        changes.close()


def test_objects_are_filtered_by_vm_name_and_operation(served: Served, capsys: Any) -> None:
    assert run(["watch", "--snapshot", "--vm", VM, "--sort", "port", "--json"]) == 0
    assert [line.get("name") for line in printed(capsys)] == [*(f"{VM}/{mac}" for mac in MACS), ""]
    assert run(["watch", "--snapshot", "--name", "b*", "--json"]) == 0
    assert {(line["sort"], line["name"]) for line in printed(capsys)[:-1]} >= {("network", "blue"), ("host", "b")}
    removal = pb.Removal(sort="port", name=f"{VM}/{MACS[1]}")

    async def remove() -> int:
        revision: int = served.world.cluster.store.revision
        served.world.cluster.apply(pb.ApplyRequest(config=pb.Config(networks=[pb.Network(name="new", kind="local")])))
        served.world.cluster.remove(removal)
        return revision

    before = str(served.do(remove()))
    assert run(["watch", "--from", before, "--vm", VM, "--removed", "--sort", "port", "--count", "1", "--json"]) == 0
    (line,) = printed(capsys)
    assert (line["op"], line["name"], line["removed"]) == ("removed", removal.name, True)


def test_what_is_new_is_known_from_the_snapshot(served: Served, capsys: Any) -> None:
    """A network that is changed all along is not new, one that was not there is."""
    over = threading.Event()

    async def change(number: int) -> None:
        old = pb.Network(name="blue", kind="uplink", vlan=10, mtu=1400 + number)
        new = pb.Network(name=f"new{number}", kind="local")
        served.world.cluster.apply(pb.ApplyRequest(config=pb.Config(networks=[old, new])))

    def go_on() -> None:
        for number in range(100):
            if over.wait(0.1):
                return
            served.do(change(number))

    with Later(go_on):
        assert run(["watch", "--sort", "network", "--added", "--count", "3", "--json"]) == 0
        over.set()
    assert all(line["op"] == "added" and line["name"].startswith("new") for line in printed(capsys))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--match", "proto=tcp"), 2, "--match needs --kind"),
        (("--here",), 2, "--here needs --kind"),
        (("--op", "arrived"), 2, "--op arrived needs --kind"),
        (("--kind", "fdb", "--from", "3"), 2, "--from is of what the coordinator has"),
        (("--kind", "fdb", "--sort", "port"), 2, "--sort is of what the coordinator has"),
        (("--from", "3", "--added"), 2, "without --from"),
        (("--jobs", "2"), 2, "--exec"),
        (("--kind", "weather"), 2, "weather"),
        (("--kind", "conntrack", "--match", "proto"), 3, "expected FIELD=VALUE"),
        (("--kind", "all", "--match", "proto=tcp"), 3, "no field of kind"),
        (("--exec", "no-such-program-here x"), 3, "no program 'no-such-program-here'"),
        (("--exec", "'unfinished"), 3, "exec:"),
        (("--kind", "fdb", "--here", "--agent", "/nowhere.sock"), 32, "no agent socket"),
        (("--kind", "fdb", "--coordinator", "127.0.0.1:1"), 32, "does not answer"),
    ],
)
def test_what_does_not_go_together_is_said(arguments: tuple[str, ...], code: int, words: str, capsys: Any) -> None:
    assert run(["watch", *arguments]) == code
    assert words in capsys.readouterr().err
