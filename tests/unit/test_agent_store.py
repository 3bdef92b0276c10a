"""What an agent finds on its disk after a crash of the host: any bytes. It starts, and says what it could not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from datapath.provider import PortRef
from migrator._pb import migrator_pb2 as pb
from migrator.agent.store import Store
from migrator.errors import JournalFailed
from tests.unit.pair import MACS, VM, eventually, world


def a_sync() -> pb.Sync:
    return pb.Sync(networks=[pb.Network(name="blue", kind="uplink", vlan=10)], hosts={"b": "10.0.0.2"}, revision=7)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert (store.sync(), store.ended()) == (pb.Sync(), {})
    store.save_sync(a_sync())
    store.save_ended({VM: 3})
    assert (Store(tmp_path).sync(), Store(tmp_path).ended()) == (a_sync(), {VM: 3})
    store.save_sync(pb.Sync())
    assert Store(tmp_path).sync() == pb.Sync()


def place(mac: str, host: str) -> pb.Place:
    return pb.Place(network="blue", mac=mac, host=host)


def update(revision: int, *places: pb.Place, removed: tuple[pb.Place, ...] = ()) -> pb.PlaceUpdate:
    return pb.PlaceUpdate(places=places, removed=removed, revision=revision)


def places(store: Store) -> dict[str, str]:
    return {one.mac: one.host for one in store.sync().places}


def test_places_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told since the last Sync counts, and what was told before it does not any more."""
    sync = a_sync()
    sync.places.extend([place("1", "a"), place("2", "a")])
    store = Store(tmp_path)
    store.add_places(update(6, place("1", "old")))
    told = (tmp_path / "places.pb").read_bytes()
    store.save_sync(sync)
    (tmp_path / "places.pb").write_bytes(told)  # the agent died between the two
    store.add_places(update(8, place("1", "b"), place("3", "b")))
    store.add_places(update(8, place("4", "b"), removed=(place("2", ""),)))
    assert places(Store(tmp_path)) == {"1": "b", "3": "b", "4": "b"}
    monkeypatch.setattr("migrator.agent.store.PLACES_BYTES", 10)
    store.add_places(update(9, place("3", "c")))
    assert not (tmp_path / "places.pb").exists()
    assert places(Store(tmp_path)) == {"1": "b", "3": "c", "4": "b"}
    assert Store(tmp_path).sync().hosts == sync.hosts


@pytest.mark.parametrize("damage", [slice(0, -3), slice(0, 9), slice(1, None)])
def test_damaged_places_are_put_aside(tmp_path: Path, damage: slice) -> None:
    store = Store(tmp_path)
    store.save_sync(a_sync())
    store.add_places(update(8, place("1", "b")))
    (tmp_path / "places.pb").write_bytes((tmp_path / "places.pb").read_bytes()[damage])
    assert Store(tmp_path).sync() == a_sync()
    assert (tmp_path / "places.damaged").exists()


def damaged(tmp_path: Path, damage: str) -> bytes:
    Store(tmp_path).save_sync(a_sync())
    good = (tmp_path / "sync.pb").read_bytes()
    return {
        "empty": b"",
        "cut off in the head": good[:11],
        "cut off": good[:-5],
        "garbage": bytes(range(255, 0, -1)),
        "a bit": good[:20] + bytes([good[20] ^ 1]) + good[21:],
        "a later version": good[:7] + b"\x02" + good[8:],
        "without a head": a_sync().SerializeToString(),
    }[damage]


@pytest.mark.parametrize(
    "damage", ["empty", "cut off in the head", "cut off", "garbage", "a bit", "a later version", "without a head"]
)
def test_a_damaged_sync_is_put_aside(tmp_path: Path, damage: str) -> None:
    data = damaged(tmp_path, damage)
    (tmp_path / "sync.pb").write_bytes(data)
    with structlog.testing.capture_logs() as logs:
        assert Store(tmp_path).sync() == pb.Sync()
    assert (tmp_path / "sync.damaged").read_bytes() == data and not (tmp_path / "sync.pb").exists()
    assert [(log["log_level"], log["name"]) for log in logs] == [("warning", "sync.damaged")]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"vm": "1"}', '{"version": 2, "ended": {}}', "\x00" * 40])
def test_a_damaged_list_of_what_ended_is_put_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / "ended.json").write_text(text)
    with structlog.testing.capture_logs() as logs:
        assert Store(tmp_path).ended() == {}
    assert (tmp_path / "ended.damaged").read_text() == text
    assert [log["log_level"] for log in logs] == ["warning"]


def test_bytes_that_are_no_text_are_put_aside(tmp_path: Path) -> None:
    (tmp_path / "ended.json").write_bytes(b"\xff\xfe{}")
    assert Store(tmp_path).ended() == {}


def sane_but_foreign() -> pb.Sync:
    sync = a_sync()
    sync.networks[0].kind = "of another version"
    return sync


@pytest.mark.parametrize("sync", [b"garbage", sane_but_foreign()], ids=["garbage", "foreign"])
def test_an_agent_starts_with_what_its_switch_and_the_coordinator_say(tmp_path: Path, sync: bytes | pb.Sync) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a") as w:
            refs = w.active("a")
            await w.stop("a")
            directory = w.directory / "a"
            if isinstance(sync, bytes):
                (directory / "sync.pb").write_bytes(sync)
            else:
                Store(directory).save_sync(sync)
            (directory / "ended.json").write_text("{")
            await w.start("a")
            assert w.active("a") == refs and len(refs) == len(MACS)
            assert {path.name for path in directory.glob("*.damaged")} == {"sync.damaged", "ended.damaged"}
            await eventually(lambda: [n.name for n in w.agents["a"].store.sync().networks] == ["blue"])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "change",
    [{"phase": "of another version"}, {"guest": "asleep"}, {"more": 1}, None],
    ids=["phase", "guest", "field", "order"],
)
def test_an_end_of_another_version_is_put_aside(tmp_path: Path, change: dict[str, object] | None) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            w.hypervisor.converged = False
            await w.migrate("b")
            await eventually(lambda: any(end.state.phase == "watching" for end in w.agents["a"].ends))
            await w.stop("a")
            path = next((w.directory / "a" / "migrations").glob("*.source.json"))
            saved = json.loads(path.read_text())
            saved.update({"order": "no hex"} if change is None else {"state": {**saved["state"], **change}})
            path.write_text(json.dumps(saved))
            await w.start("a")
            assert not list(w.agents["a"].ends)
            assert path.with_suffix(".damaged").exists() and not path.exists()
            assert len(w.active("a")) == len(MACS)

    asyncio.run(scenario())


def test_an_epoch_that_ended_is_remembered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, "a", "b") as w:
            old = w.active("a")[0]
            await w.finish(await w.migrate("b"))
            await w.quiet()
            assert PortRef(VM, old.mac, w.agents["a"].store.ended()[VM]) == old

    asyncio.run(scenario())


@contextlib.contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """The kernel writes files up to a size and says how much that was, as when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def an_end(**state: str) -> dict[str, object]:
    return {"id": "m", "role": "source", "vm": VM, "state": state, "order": "00"}


def test_a_disk_that_becomes_full_leaves_a_migration_whole(tmp_path: Path) -> None:
    """A short text has its room from the beginning; one that has none any more leaves what was written before."""
    store = Store(tmp_path)
    store.save_end("m.source", an_end(phase="probing"))
    room = (tmp_path / "migrations" / "m.source.json").stat().st_size
    with no_room_beyond(room):
        store.save_end("m.source", an_end(phase="copying", more="x" * 500))
        with pytest.raises(JournalFailed):
            store.save_end("m.source", an_end(phase="final", more="x" * room))
        store.save_end("m.source", an_end(phase="draining"))
    assert [end["state"] for end in Store(tmp_path).ends()] == [{"phase": "draining"}]
    with no_room_beyond(room + 100):
        with pytest.raises(JournalFailed):
            store.save_end("m.source", an_end(phase="final", more="x" * room))
    assert [end["state"] for end in Store(tmp_path).ends()] == [{"phase": "draining"}]


def test_a_migration_that_has_no_room_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with no_room_beyond(100), pytest.raises(JournalFailed):
        store.save_end("m.source", an_end(phase="probing"))
    store.forget_end("m.source")
    assert not Store(tmp_path).ends() and not list((tmp_path / "migrations").iterdir())


def test_frames_that_have_no_room_are_in_memory_only(tmp_path: Path) -> None:
    kept = Store(tmp_path).taken("m.source")
    with no_room_beyond(100), structlog.testing.capture_logs() as logs:
        kept.keep({MACS[0]: [b"x" * 200]})
    assert [log["event"] for log in logs] == ["taken frames are in memory only"]
