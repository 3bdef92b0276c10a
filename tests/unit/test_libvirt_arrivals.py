"""The agent's answers to libvirt's hook: socket, operations, arrivals; the agent and libvirt are played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.agent.libvirt import arrivals
from migrator.agent.libvirt.arrivals import Arrivals
from migrator.agent.libvirt.domain import Domain
from migrator.agent.libvirt.hooksocket import HookSocket, Reply, Request
from migrator.agent.libvirt.operations import Operations
from migrator.agent.libvirt.options import LibvirtOptions
from migrator.errors import AlreadyMigrating, ConfigInvalid, MigrationNotFound, PeerLost, PreflightFailed

VM = "6f0c4d2e-7a55-4c0e-9d5e-3f2b8a1c0d01"
DEADLINE_S = 10.0


def domain_xml(*, kind: str = "ethernet", dev: str = "hooktest0", managed: str = "no", name: str = "shop") -> str:
    return f"""<domain type='qemu'><name>{name}</name><uuid>{VM}</uuid>
    <metadata><ports xmlns="urn:vm-netstate-migrator:ports:1"><port mac="52:54:00:00:00:10" network="blue"/></ports>
    </metadata>
    <devices><interface type='{kind}'><mac address='52:54:00:00:00:10'/><target dev='{dev}' managed='{managed}'/>
    </interface></devices></domain>"""


class Side:
    """The agent. `scripts`: for each call of bring the reports that come, or an error; None waits for `go_on`."""

    host = "h2"

    def __init__(self, *scripts: Sequence[pb.Migration | Exception | None]) -> None:
        self.scripts = list(scripts)
        self.brought = 0
        self.called_off: list[str] = []
        self.phase = ""
        self.go_on = asyncio.Event()

    async def bring(self, vm: str, *, strict: bool = False) -> AsyncIterator[pb.Migration]:
        assert vm == VM
        self.strict = strict
        self.brought += 1
        for item in self.scripts.pop(0):
            if isinstance(item, Exception):
                raise item
            if item is None:
                await self.go_on.wait()
                self.go_on.clear()
            else:
                self.phase = "loading"
                yield item
        self.phase = ""

    async def call_off(self, vm: str, reason: str) -> None:
        assert vm == VM
        self.called_off.append(reason)
        self.phase = ""

    def arriving(self, vm: str) -> str:
        assert vm == VM
        return self.phase


class Inventory:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refusal: Exception | None = None
        self.slow = asyncio.Event()
        self.slow.set()

    async def _called(self, what: str) -> None:
        await self.slow.wait()
        self.calls.append(what)

    async def starting(self, domain: Domain, *, unknown: bool = False) -> list[str]:
        await self._called(f"starting {domain.name}{' unknown' if unknown else ''}")
        if self.refusal is not None:
            raise self.refusal
        return []

    async def coming_back(self, domain: Domain) -> None:
        await self._called(f"coming back {domain.name}")

    async def restoring(self, domain: Domain) -> list[str]:
        await self._called(f"restoring {domain.name}")
        return ["1 record was not restored"]

    async def started(self, domain: Domain) -> None:
        await self._called(f"started {domain.name}")

    async def stopped(self, domain: Domain) -> None:
        await self._called(f"stopped {domain.name}")


class Taps:
    def __init__(self) -> None:
        self.made: set[str] = set()

    def make(self, domain: Domain) -> list[str]:
        self.made |= {one.device for one in domain.owned if not one.managed}
        return sorted(self.made)

    def remove(self, vm: str) -> list[str]:
        assert vm == VM
        self.made.clear()
        return []


class Bench:
    """Operations as the agent has them, with short patience."""

    def __init__(
        self, *scripts: Sequence[pb.Migration | Exception | None], begin_s: float = 5, copy_s: float = 5
    ) -> None:
        self.side = Side(*scripts)
        self.inventory = Inventory()
        self.taps = Taps()
        self.arrivals = Arrivals(self.side, begin_s=begin_s, copy_s=copy_s)  # type: ignore[arg-type]
        self.operations = Operations("h2", self.inventory, self.taps, self.arrivals)  # type: ignore[arg-type]

    async def hook(self, operation: str, xml: str = "", sub: str = "begin") -> Reply:
        request = {"op": "hook", "operation": operation, "sub": sub, "domain": "shop", "xml": xml or domain_xml()}
        return await self.operations.answer(request)

    async def quiet(self) -> None:
        """Until what was only told is done."""
        async with asyncio.timeout(DEADLINE_S):
            while self.operations._tasks:
                await asyncio.gather(*self.operations._tasks)


def report(phase: str, outcome: str = "", reason: str = "") -> pb.Migration:
    return pb.Migration(id="m1", vm=VM, source="h1", phase=phase, outcome=outcome, reason=reason, done=bool(outcome))


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


# ---- a VM that comes ----


def test_migrate_answers_when_the_source_copies_and_prepare_when_the_first_copy_is_here() -> None:
    async def work() -> None:
        bench = Bench([report("preparing"), report("pre-copy"), None, report("authorised"), None])
        assert await bench.hook("migrate") == {"ok": True}
        waiting = asyncio.ensure_future(bench.hook("prepare"))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done and bench.taps.made == {"hooktest0"}
        bench.side.go_on.set()
        assert await waiting == {"ok": True}
        assert await bench.hook("start") == {"ok": True}
        await bench.hook("started")
        await bench.quiet()
        assert bench.inventory.calls == []  # what comes is not a start
        assert bench.side.brought == 1
        await bench.arrivals.stop()

    run(work)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([PreflightFailed("host h2 lacks network blue")], "lacks network blue"),
        ([report("preparing"), report("aborted", "refused", "no room for 65536 connections")], "no room for 65536"),
        ([report("preparing"), report("aborted", "aborted", "the path carries no full-size frame")], "full-size frame"),
        ([PeerLost("no coordinator")], "no coordinator"),
    ],
)
def test_migrate_is_refused_with_the_reason(script: list[Any], reason: str) -> None:
    async def work() -> None:
        bench = Bench(script)
        with pytest.raises(Exception, match=reason):
            await bench.hook("migrate")
        assert not bench.arrivals.in_hand(VM)

    run(work)


def test_a_vm_that_nobody_knows_is_off_or_comes_from_a_host_without_an_agent() -> None:
    async def work() -> None:
        bench = Bench([MigrationNotFound("no port is declared for VM 'shop'")])
        assert await bench.hook("migrate") == {"ok": True}
        assert not bench.arrivals.in_hand(VM)
        assert await bench.hook("prepare") == {"ok": True}
        await bench.hook("prepare")  # the next start is one like any other
        assert bench.inventory.calls == ["starting shop unknown", "starting shop"]

    run(work)


def test_migrate_is_not_waited_for_for_ever() -> None:
    async def work() -> None:
        bench = Bench([report("preparing"), None], begin_s=0.1)
        with pytest.raises(Exception, match=r"not staged after 0\.1 s"):
            await bench.hook("migrate")
        assert bench.side.called_off == ["it was not staged in time"]
        await bench.arrivals.stop()

    run(work)


def test_the_last_migration_of_the_vm_may_be_ending_still() -> None:
    async def work() -> None:
        bench = Bench([AlreadyMigrating("settles")], [AlreadyMigrating("settles")], [report("pre-copy"), None])
        assert await bench.hook("migrate") == {"ok": True}
        assert bench.side.brought == 3
        await bench.arrivals.stop()

    run(work)


def test_a_migration_in_hand_that_is_being_undone_is_followed_by_a_new_one() -> None:
    async def work() -> None:
        bench = Bench(
            [report("pre-copy"), report("aborted", "aborted", "the last attempt")], [report("pre-copy"), None]
        )
        bench.side.phase = "loading"
        bench.side.scripts[0] = bench.side.scripts[0][1:]
        assert await bench.hook("migrate") == {"ok": True}
        assert bench.side.brought == 2
        await bench.arrivals.stop()

    run(work)


def test_prepare_goes_on_without_the_whole_copy_and_fails_when_the_migration_has() -> None:
    async def work() -> None:
        slow = Bench([report("pre-copy"), None], copy_s=0.1)
        await slow.hook("migrate")
        assert await slow.hook("prepare") == {"ok": True}
        await slow.arrivals.stop()

        undone = Bench([report("pre-copy"), None, report("aborted", "aborted", "the source said no")])
        await undone.hook("migrate")
        waiting = asyncio.ensure_future(undone.hook("prepare"))
        await asyncio.wait({waiting}, timeout=0.05)
        undone.side.go_on.set()
        with pytest.raises(PreflightFailed, match="the source said no"):
            await waiting
        assert undone.taps.made == set()

    run(work)


def test_prepare_fails_at_once_when_the_source_is_lost() -> None:
    """Its guest has not begun to move; going on would move it without its connections."""

    async def work() -> None:
        bench = Bench([report("pre-copy"), None], copy_s=DEADLINE_S * 3)
        await bench.hook("migrate")
        waiting = asyncio.ensure_future(bench.hook("prepare"))
        await asyncio.wait({waiting}, timeout=0.05)
        bench.side.phase = "fenced"
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(PeerLost, match="the agent of h1 was lost during the first copy"):
                await waiting
        assert bench.taps.made == set()
        await bench.arrivals.stop()

    run(work)


@pytest.mark.parametrize("lost", [None, PeerLost("no coordinator")])
def test_prepare_fails_when_the_source_never_begins(lost: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent died before it connected, or the coordinator before it told it."""
    monkeypatch.setattr(arrivals, "BEGUN_S", 0.3)

    async def work() -> None:
        bench = Bench([report("pre-copy"), lost], [PeerLost("no coordinator")], copy_s=DEADLINE_S * 3)
        await bench.hook("migrate")
        bench.side.phase = "staged"
        with pytest.raises(PeerLost, match="has not begun to copy"):
            await bench.hook("prepare")
        assert bench.taps.made == set()
        await bench.arrivals.stop()

    run(work)


def test_an_agent_started_meanwhile_joins_at_prepare() -> None:
    async def work() -> None:
        bench = Bench([report("pre-copy"), report("authorised"), None])
        bench.side.phase = "loading"
        assert await bench.hook("prepare") == {"ok": True}
        assert bench.side.brought == 1 and bench.inventory.calls == []
        await bench.arrivals.stop()

    run(work)


def test_coordinator_lost_in_pre_copy_is_no_reason_to_refuse() -> None:
    async def work() -> None:
        bench = Bench([report("pre-copy"), PeerLost("gone")], [PeerLost("gone")])
        await bench.hook("migrate")
        assert await bench.hook("prepare") == {"ok": True}
        assert bench.taps.made == {"hooktest0"}

    run(work)


@pytest.mark.parametrize("phase", ["staged", "loading", "committed", "fenced"])
def test_a_machine_that_ends_before_its_guest_ran_calls_the_migration_off(phase: str) -> None:
    async def work() -> None:
        bench = Bench([report("pre-copy"), None], copy_s=0.01)
        await bench.hook("migrate")
        await bench.hook("prepare", domain_xml(managed="yes", dev="vnet7"))
        bench.side.phase = phase
        assert await bench.hook("stopped", sub="end") == {"ok": True}
        assert await bench.hook("release", sub="end") == {"ok": True}
        await bench.quiet()
        assert bench.side.called_off == ["its machine on h2 ended before the guest ran there"]
        assert bench.inventory.calls == [] and bench.taps.made == set()
        await bench.arrivals.stop()

    run(work)


def test_what_is_told_late_of_the_last_attempt_calls_nothing_off() -> None:
    """A libvirtd that died in a migration ends its machine when it is back: the next one may have begun by then."""

    async def work() -> None:
        bench = Bench([report("pre-copy"), None], copy_s=0.01)
        await bench.hook("migrate")
        bench.side.phase = "loading"
        for operation in ("stopped", "release"):
            await bench.hook(operation, sub="end")
        await bench.quiet()
        assert bench.side.called_off == [] and bench.inventory.calls == []
        await bench.hook("prepare")
        await bench.hook("stopped", sub="end")
        await bench.quiet()
        assert len(bench.side.called_off) == 1
        await bench.arrivals.stop()

    run(work)


def test_a_machine_that_ends_after_its_guest_ran_is_a_stop() -> None:
    async def work() -> None:
        bench = Bench([report("pre-copy"), report("authorised"), report("settled"), report("done", "complete")])
        await bench.hook("migrate")
        while bench.arrivals.in_hand(VM):
            await asyncio.sleep(0)
        bench.side.phase = "settled"
        await bench.hook("stopped", sub="end")
        await bench.quiet()
        assert bench.side.called_off == [] and bench.inventory.calls == ["stopped shop"]

    run(work)


def test_a_device_that_libvirt_named_gets_the_name_of_its_port() -> None:
    async def work() -> None:
        bench = Bench([report("pre-copy"), None])
        reply = await bench.hook("migrate", domain_xml(kind="bridge", dev="vnet3", managed="yes"))
        assert 'dev="p0000106f0c4d2e"' in reply["xml"]
        await bench.arrivals.stop()

    run(work)


def test_a_device_that_exists_refuses_before_libvirt_deletes_it() -> None:
    async def work() -> None:
        bench = Bench([report("pre-copy"), None])
        with pytest.raises(PreflightFailed, match="has a device lo already"):
            await bench.hook("migrate", domain_xml(managed="yes", dev="lo"))
        assert bench.side.brought == 0

    run(work)


# ---- a VM that starts and ends here ----


def test_a_start_has_taps_made_and_ports_declared_then_what_was_saved_restored() -> None:
    async def work() -> None:
        bench = Bench()
        for operation in ("restore", "prepare", "start", "started"):
            assert await bench.hook(operation) == {"ok": True}
        await bench.quiet()
        assert bench.inventory.calls == ["coming back shop", "starting shop", "restoring shop", "started shop"]
        assert bench.taps.made == {"hooktest0"}

    run(work)


def test_a_refused_start_leaves_no_tap() -> None:
    async def work() -> None:
        bench = Bench()
        bench.inventory.refusal = ConfigInvalid("no network blue")
        with pytest.raises(ConfigInvalid, match="no network blue"):
            await bench.hook("prepare")
        assert bench.taps.made == set()

    run(work)


@pytest.mark.parametrize("operation", ["migrate", "prepare"])
def test_interfaces_that_cannot_be_owned_are_refused_by_name(operation: str) -> None:
    async def work() -> None:
        bench = Bench()
        with pytest.raises(PreflightFailed, match="interface 52:54:00:00:00:10: type='direct' cannot be owned"):
            await bench.hook(operation, domain_xml(kind="direct"))
        assert bench.side.brought == 0 and bench.taps.made == set()

    run(work)


def test_a_start_waits_for_the_end_before_it() -> None:
    async def work() -> None:
        bench = Bench()
        bench.inventory.slow.clear()
        await bench.hook("stopped", sub="end")  # answered at once all the same
        await bench.hook("release", sub="end")
        waiting = asyncio.ensure_future(bench.hook("prepare"))
        await asyncio.wait({waiting}, timeout=0.05)
        assert not waiting.done() and bench.inventory.calls == []
        bench.inventory.slow.set()
        await waiting
        assert bench.inventory.calls == ["stopped shop", "starting shop"]
        assert bench.taps.made == {"hooktest0"}

    run(work)


@pytest.mark.parametrize("operation", ["started", "stopped", "release", "reconnect", "attach", "new"])
def test_what_may_not_fail_takes_any_xml(operation: str) -> None:
    async def work() -> None:
        bench = Bench()
        assert await bench.hook(operation, "<!DOCTYPE x><domain/>", sub="end") == {"ok": True}

    run(work)


def test_a_domain_that_is_not_ours_is_let_through() -> None:
    async def work() -> None:
        described = "<description>urn:vm-netstate-migrator:ports:1</description>"
        xml = f"<domain><name>x</name><uuid>{VM}</uuid>{described}</domain>"
        bench = Bench()
        assert await bench.hook("migrate", xml) == await bench.hook("prepare", xml) == {"ok": True}
        assert bench.side.brought == 0 and bench.inventory.calls == []

    run(work)


# ---- the socket ----


async def ask(path: Path, data: bytes) -> Any:
    reader, writer = await asyncio.open_unix_connection(str(path), limit=16 << 20)
    writer.write(data)
    line = await reader.readline()
    writer.close()
    with contextlib.suppress(OSError):  # it may have stopped reading
        await writer.wait_closed()
    return json.loads(line) if line else None


class Served:
    """A socket with one handler, for the length of a block."""

    def __init__(self, path: Path, handler: Callable[[Request], Coroutine[Any, Any, Reply]]) -> None:
        self.socket = HookSocket(path, {"hook": handler})

    async def __aenter__(self) -> None:
        await self.socket.start()

    async def __aexit__(self, *_: object) -> None:
        await self.socket.stop()


async def echo(request: Request) -> Reply:
    return {"ok": True, "xml": request.get("xml", "")}


def test_one_line_is_answered_by_one_line(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "run" / "hook.sock"
        async with Served(path, echo):
            assert path.stat().st_mode & 0o777 == 0o600
            big = "ä" * (1 << 20)
            assert await ask(path, json.dumps({"op": "hook", "xml": big}).encode() + b"\n") == {"ok": True, "xml": big}
        assert not path.exists()

    run(work)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\n", "not one line of JSON"),
        (b"[]\n", "not an object of texts"),
        (b'{"op": {}}\n', "not an object of texts"),
        (b'{"op": "nothing"}\n', "expected one of hook, not 'nothing'"),
        (b"\xff\xfe\n", "not one line of JSON"),
        (b"[" * 100_000 + b"\n", "nested too deeply|not one line of JSON"),
        (b"x" * (9 << 20) + b"\n", "at most 8388608 bytes"),
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    async def work() -> None:
        async with Served(tmp_path / "hook.sock", echo):
            answer = await ask(tmp_path / "hook.sock", data)
            assert not answer["ok"]
            assert any(part in answer["reason"] for part in reason.split("|"))

    run(work)


def test_errors_are_reasons(tmp_path: Path) -> None:
    async def refuse(request: Request) -> Reply:
        if request["domain"] == "ours":
            raise PreflightFailed("host h2 is full", hint="use another", reasons=["no slot"])
        raise KeyError("bug")

    async def work() -> None:
        path = tmp_path / "hook.sock"
        async with Served(path, refuse):
            answer = await ask(path, b'{"op": "hook", "domain": "ours"}\n')
            assert answer == {"ok": False, "reason": "host h2 is full (use another); no slot"}
            answer = await ask(path, b'{"op": "hook", "domain": "bug"}\n')
            assert not answer["ok"] and "internal error" in answer["reason"]

    run(work)


def test_who_hangs_up_is_no_longer_served(tmp_path: Path) -> None:
    async def work() -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def wait(_: Request) -> Reply:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return {"ok": True}

        async with Served(tmp_path / "hook.sock", wait):
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "hook.sock"))
            writer.write(b'{"op": "hook"}\n')
            await asyncio.wait_for(began.wait(), DEADLINE_S)
            writer.close()
            await asyncio.wait_for(ended.wait(), DEADLINE_S)

    run(work)


def test_stopping_hangs_up_on_who_waits(tmp_path: Path) -> None:
    async def work() -> None:
        began = asyncio.Event()

        async def wait(_: Request) -> Reply:
            began.set()
            await asyncio.Event().wait()
            return {"ok": True}

        async with Served(tmp_path / "hook.sock", wait):
            waiting = asyncio.ensure_future(ask(tmp_path / "hook.sock", b'{"op": "hook"}\n'))
            await asyncio.wait_for(began.wait(), DEADLINE_S)
        assert await waiting is None

    run(work)


def test_no_more_than_so_many_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "hook.sock"
        async with Served(path, echo):
            idle = [await asyncio.open_unix_connection(str(path)) for _ in range(64)]
            answer = await ask(path, b'{"op": "hook"}\n')
            assert not answer["ok"] and "at once" in answer["reason"]
            for _, writer in idle:
                writer.close()
            deadline = time.monotonic() + DEADLINE_S
            while not (answer := await ask(path, b'{"op": "hook"}\n'))["ok"]:
                assert time.monotonic() < deadline, answer

    run(work)


@pytest.mark.root
def test_only_root_is_served() -> None:
    """By the socket's mode; and where that was loosened, by who the kernel says it is."""
    code = (
        'import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b\'{"op":"hook"}\\n\'); '
    )
    code += "sys.stdout.buffer.write(s.recv(100))"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]  # not in a fork, which gRPC's threads mind

    async def work() -> None:
        short = Path("/run") / f"hook-{os.getpid()}.sock"
        async with Served(short, echo):
            for mode in (0o600, 0o666):
                short.chmod(mode)
                done = await asyncio.to_thread(
                    subprocess.run,
                    [*nobody, "/usr/bin/python3", "-I", "-c", code, str(short)],
                    capture_output=True,
                    timeout=20,
                )
                assert b"ok" not in done.stdout
                assert (b"PermissionError" in done.stderr) == (mode == 0o600)

    run(work)


def test_a_new_agent_takes_the_place_of_a_dead_ones_socket(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "hook.sock"
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(path))
        dead.close()
        async with Served(path, echo):
            assert (await ask(path, b'{"op": "hook"}\n'))["ok"]

    run(work)


def test_options_are_checked() -> None:
    assert str(LibvirtOptions.of({}).hook_socket) == "/run/migrator/hook.sock"
    with pytest.raises(ConfigInvalid, match=r"guests\.copy_wait_s.*guests\.misspelt|guests\.misspelt.*"):
        LibvirtOptions.of({"copy_wait_s": "soon", "misspelt": 1})
