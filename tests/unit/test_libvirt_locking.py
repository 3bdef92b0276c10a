"""Strict mode on the agent's side: marks, answers to libvirt's lock driver, and how the driver is put on a host."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from datapath.errors import FeatureMissing
from migrator.agent.household import Household
from migrator.agent.libvirt import lockdriver
from migrator.agent.libvirt.domain import parse
from migrator.agent.libvirt.locking import WAIT_S, Locking, Marks, guard
from migrator.agent.libvirt.options import LibvirtOptions
from migrator.cli.main import run
from migrator.errors import ConfigInvalid, JournalFailed
from migrator.lifecycle.machine import Role
from tests.unit.pair import VM, World, eventually, world

SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION


# ---- marks ----


def test_a_mark_goes_with_the_last_migration_that_needs_it(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "strict")
    arriving = tmp_path / "strict" / f"{VM}.arriving"
    marks.put(VM, DESTINATION, "1")
    marks.put(VM, DESTINATION, "2")
    marks.put(VM, SOURCE, "3")
    for migration in ("1", "1", "other"):
        marks.take(VM, DESTINATION, migration)
        assert arriving.exists()
    marks.take(VM, DESTINATION, "2")
    assert [path.name for path in (tmp_path / "strict").iterdir()] == [f"{VM}.leaving"]


def test_what_an_earlier_run_left_goes_unless_it_is_put_again(tmp_path: Path) -> None:
    Marks(tmp_path / "strict").put(VM, DESTINATION, "1")
    Marks(tmp_path / "strict").put(VM, SOURCE, "2")
    again = Marks(tmp_path / "strict")
    again.put(VM, SOURCE, "2")
    again.take(VM, DESTINATION, "1")
    assert (tmp_path / "strict" / f"{VM}.arriving").exists(), "not its own: only `prune` knows that nobody needs it"
    again.prune()
    assert [path.name for path in (tmp_path / "strict").iterdir()] == [f"{VM}.leaving"]


def test_a_vm_that_cannot_be_guarded_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "strict").touch()
    marks = Marks(tmp_path / "strict")
    with pytest.raises(JournalFailed, match="strict"):
        marks.put(VM, SOURCE, "1")
    assert "strict" in guard(marks, VM, SOURCE, "1", lambda: "")
    assert guard(marks, VM, SOURCE, "1", lambda: "not loaded") == "not loaded"


# ---- answers ----


def answered(op: str, uuid: str = VM.upper(), **side: object) -> tuple[dict[str, object], list[str]]:
    stopped: list[str] = []
    locking = Locking(Mock(**side), stopped.append)
    return asyncio.run(getattr(locking, op)({"uuid": uuid})), stopped


def test_release_is_the_pause_and_acquire_the_question() -> None:
    assert answered("release", left=AsyncMock(return_value=True)) == ({"ok": True}, [VM])
    late, _ = answered("release", left=AsyncMock(return_value=False))
    assert late == {"ok": False, "reason": f"the destination has not committed within {WAIT_S:g} s"}
    assert answered("acquire", may_start=AsyncMock(return_value="")) == ({"ok": True}, [])
    refused, _ = answered("acquire", may_start=AsyncMock(return_value="no"))
    assert refused == {"ok": False, "reason": "no"}
    with pytest.raises(ConfigInvalid, match="uuid"):
        answered("acquire", uuid="../x")


# ---- what the agent says ----


def scenario(tmp_path: Path, test: Callable[[World, Household, Household], Awaitable[None]], **settings: float) -> None:
    async def run_it() -> None:
        async with world(tmp_path, "a", "b", **settings) as w:
            w.fill("a", 10)
            await test(w, w.agents["a"].household, w.agents["b"].household)

    asyncio.run(run_it())


class Held:
    """The commit at b waits until `let_go`."""

    def __init__(self, w: World) -> None:
        self._w = w
        self._go = threading.Event()
        self._commit = w.driver("b").commit
        w.driver("b").commit = self.commit  # type: ignore[method-assign]
        w.hypervisor.downtime_s = 60.0  # until the test says otherwise

    def commit(self, ref: object) -> None:
        self._go.wait(10)
        self._commit(ref)  # type: ignore[arg-type]

    async def begin(self) -> str:
        migration = await self._w.migrate("b", strict=True)
        await eventually(lambda: self._w.agents["a"].household.leaving(VM) == "final")
        return migration

    def let_go(self) -> None:
        self._go.set()

    async def arrive(self, migration: str) -> str:
        self._w.hypervisor.moving = ""
        self._w.hypervisor.resume("b", "migrated")
        self._w.hypervisor.tell("a", "gone", "migrated", moving=True)
        return (await self._w.finish(migration)).outcome


def test_rule_strict_waits_for_the_commit(tmp_path: Path) -> None:
    async def test(w: World, a: Household, b: Household) -> None:
        held = Held(w)
        migration = await held.begin()
        assert w.hypervisor.sides["a"].guarded == {(SOURCE, migration)}
        assert w.hypervisor.sides["b"].guarded == {(DESTINATION, migration)}
        assert not await a.left(VM, 0.05)
        assert "has not come within 0.05 s" in await b.may_start(VM, 0.05)
        waiting = asyncio.gather(a.left(VM, 5.0), b.may_start(VM, 5.0))
        await asyncio.sleep(0)
        held.let_go()
        assert await waiting == [True, ""]
        assert not w.hypervisor.sides["b"].guarded, "who has committed needs the agent no more"
        assert await held.arrive(migration) == "complete"
        await w.quiet()
        assert not w.hypervisor.sides["a"].guarded
        assert await a.left(VM, 5.0) and await b.may_start(VM, 5.0) == ""

    scenario(tmp_path, test)


def test_rule_a_start_at_the_source_activates_its_ports_first(tmp_path: Path) -> None:
    async def test(w: World, a: Household, *_: Household) -> None:
        held = Held(w)
        migration = await held.begin()
        assert not w.active("a")
        w.hypervisor.moving = ""
        assert await a.may_start(VM, 5.0) == ""
        assert len(w.active("a")) == 2, "before the answer"
        held.let_go()
        assert (await w.finish(migration)).outcome == "aborted"
        await w.quiet()
        assert not w.hypervisor.sides["a"].guarded | w.hypervisor.sides["b"].guarded
        assert not w.statuses("b")

    scenario(tmp_path, test)


def test_what_cannot_come_any_more_is_refused_at_once(tmp_path: Path) -> None:
    async def test(w: World, a: Household, b: Household) -> None:
        held = Held(w)
        migration = await held.begin()
        w.driver("b").commit = Mock(side_effect=FeatureMissing("no room"))  # type: ignore[method-assign]
        held._commit = w.driver("b").commit
        held.let_go()
        async with asyncio.timeout(2.0):
            assert "cannot be completed any more" in await b.may_start(VM, 60.0)
            assert await a.left(VM, 60.0), "given up"
        assert (await w.finish(migration)).outcome == "aborted"

    scenario(tmp_path, test)


def test_a_move_that_is_not_strict_waits_for_nobody(tmp_path: Path) -> None:
    async def test(w: World, a: Household, b: Household) -> None:
        held = Held(w)
        migration = await w.migrate("b")
        await eventually(lambda: a.leaving(VM) == "final")
        async with asyncio.timeout(1.0):
            assert await a.left(VM, 60.0) and await b.may_start(VM, 60.0) == ""
        assert not w.hypervisor.sides["a"].guarded | w.hypervisor.sides["b"].guarded
        held.let_go()
        assert await held.arrive(migration) == "complete"

    scenario(tmp_path, test)


@pytest.mark.parametrize("host", ["a", "b"])
def test_a_host_that_cannot_hold_a_guest_is_refused(tmp_path: Path, host: str) -> None:
    async def test(w: World, *_: Household) -> None:
        w.hypervisor.sides[host].guards = False
        report = await w.finish(await w.migrate("b", strict=True))
        assert report.outcome in {"refused", "aborted"}
        assert "has no lock driver" in report.reason
        await w.quiet()
        assert len(w.active("a")) == 2 and not w.statuses("b")
        assert (await w.finish(await w.migrate("b"))).outcome == "complete"

    scenario(tmp_path, test)


def test_a_restarted_agent_guards_what_has_not_been_committed(tmp_path: Path) -> None:
    async def test(w: World, *_: Household) -> None:
        held = Held(w)
        migration = await held.begin()
        for host, guarded in (("a", {(SOURCE, migration)}), ("b", set())):
            await w.stop(host)
            w.hypervisor.sides[host].guarded.clear()
            await w.agent(host)
            assert w.hypervisor.sides[host].guarded == guarded
            held.let_go()
            await eventually(lambda: all(status.committed for status in w.statuses("b")))

    scenario(tmp_path, test)


# ---- which moves ----


@pytest.mark.parametrize(("text", "strict"), [("", None), (" strict='yes'", True), (" strict='no'", False)])
def test_the_domain_says_whether_it_is_strict(text: str, strict: bool | None) -> None:
    ours = f"<metadata><ports xmlns='urn:vm-netstate-migrator:ports:1'{text}/></metadata>"
    assert parse(f"<domain><name>shop</name><uuid>{VM}</uuid>{ours}</domain>").strict is strict


def test_a_misspelt_word_is_refused() -> None:
    ours = "<metadata><ports xmlns='urn:vm-netstate-migrator:ports:1' strict='true'/></metadata>"
    with pytest.raises(ConfigInvalid, match="strict: expected yes or no"):
        parse(f"<domain><name>shop</name><uuid>{VM}</uuid>{ours}</domain>")
    assert not LibvirtOptions().strict


# ---- on a host ----


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """libvirt's directory with a qemu.conf; the built driver is played by a file."""
    built = tmp_path / "built.so"
    built.write_bytes(b"driver")
    monkeypatch.setattr(lockdriver, "source", lambda: built)
    made = tmp_path / "libvirt" / "qemu.conf"
    made.parent.mkdir()
    made.write_text('user = "root"\n# lock_manager = "lockd"')
    made.chmod(0o600)
    return made


def test_the_driver_is_put_there_named_and_taken_away(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, before = conf.parent / "lock-driver", conf.read_text()
    words = ["--directory", str(conf.parent / "hooks"), "--lock-drivers", str(place)]
    assert run(["libvirt", "install", "--strict", "--dry-run", *words]) == 0
    assert conf.read_text() == before and not place.exists()
    assert run(["libvirt", "install", "--strict", *words]) == 0
    said = capsys.readouterr().out
    assert f"{place}/migrator.so: installed" in said and "has to be restarted" in said
    assert lockdriver.configured(conf) == "migrator" and conf.read_text().startswith(before + "\n")
    assert (place / "migrator.so").read_bytes() == b"driver" and conf.stat().st_mode & 0o777 == 0o600
    assert not lockdriver.install(place, conf), "once is enough"
    assert run(["libvirt", "uninstall", *words]) == 0
    assert conf.read_text() == before + "\n" and not list(place.iterdir())


def test_another_lock_manager_stays(conf: Path) -> None:
    conf.write_text(text := "lock_manager = 'sanlock'\n")
    place = conf.parent / "lock-driver"
    with pytest.raises(ConfigInvalid, match="sanlock"):
        lockdriver.install(place, conf)
    assert not lockdriver.uninstall(place, conf)
    assert conf.read_text() == text and not place.exists()


def test_nothing_of_libvirt_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockdriver.installation, "DAEMONS", ("no-such-daemon",))
    assert lockdriver.missing() == "no libvirtd is seen on this host"
    me = Path("/proc/self/comm").read_text().strip()
    monkeypatch.setattr(lockdriver.installation, "DAEMONS", (me,))
    assert f"{me} (process" in lockdriver.missing() and "has not loaded the lock driver" in lockdriver.missing()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces")
def test_a_daemon_that_has_loaded_it_is_seen_wherever_the_agent_has_its_files(tmp_path: Path) -> None:
    """A service may have a mount namespace of its own; processes of another network are another host's."""
    library = tmp_path / "migrator.so"
    subprocess.run([Path(__file__).parents[2] / "tools" / "lock_driver", library], check=True)
    script = (
        "import ctypes, sys; open('/proc/self/comm', 'w').write('libvirtd-test'); ctypes.CDLL(sys.argv[1]); "
        "print('loaded', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", script, str(library)]
    ask = (
        "from migrator.agent.libvirt import lockdriver as l; l.installation.DAEMONS = ('libvirtd-test',); "
        "print(l.missing() or 'loaded')"
    )
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None and daemon.stdout.readline() == "loaded\n"
            for apart, says in (("--mount", "loaded"), ("--net", "no libvirtd is seen on this host")):
                found = subprocess.run(["unshare", apart, sys.executable, "-c", ask], capture_output=True, text=True)
                assert found.stdout.strip() == says, found.stderr
        finally:
            daemon.kill()
