# SPDX-License-Identifier: GPL-2.0-only
"""Maps of another shape are taken over in place: what lives on, what is refused, and a takeover that dies."""

from __future__ import annotations

import contextlib
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.takeover import Takeover
from datapath.errors import KernelError, NotReady, UnsupportedKind
from datapath.state.conntrack import CONNTRACK, STATES, TIMEOUTS
from datapath.state.kind import Table
from migrator.lab.processes import PATIENT_S

from .driver_lab import Guest, Host, hosts, wait_until
from .test_driver_tables import connections

MANY = 100_000
_SO_RCVBUFFORCE = 33  # linux: asm-generic/socket.h
UDP = {"direction": "from", "priority": 1, "protocol": "udp", "ports": [[7, 7]], "action": "allow"}
ASKED = {**UDP, "direction": "to"}  # answers pass by state alone


@pytest.fixture
def host() -> Iterator[Host]:
    with hosts(1) as (made,):
        yield made


class Talk:
    """Numbered datagrams from one guest to another, which sends each back."""

    def __init__(self, near: Guest, far: Guest) -> None:
        self.sent, self.answers = 0, list[int]()
        self._near, self._far = near.socket(socket.SOCK_DGRAM), far.socket(socket.SOCK_DGRAM)
        for end in (self._near, self._far):  # what waited comes at once
            end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        self._far.bind((far.address, 7))
        self._near.bind((near.address, 40_000))
        self._near.connect((far.address, 7))
        self._sending, self._going, self._sent_all = True, True, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while self._going:
            ready, _, _ = select.select([self._near, self._far], [], [], max(0.0, min(0.01, due - time.monotonic())))
            if self._far in ready:
                data, address = self._far.recvfrom(100)
                self._far.sendto(data, address)
            if self._near in ready:
                self.answers.append(int(self._near.recv(100)))
            if not self._sending:
                self._sent_all.set()
            elif time.monotonic() >= due:
                self._near.send(str(self.sent).encode())
                self.sent, due = self.sent + 1, max(due, time.monotonic() - 0.001) + 0.001

    def run_on(self, count: int = 300) -> None:
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal, f"{goal} answers")

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing more is sent meanwhile: what is held has its limit, and a restart may take a minute."""
        self._rest()
        yield
        self._sending = True

    def _rest(self) -> None:
        self._sent_all.clear()
        self._sending = False
        assert self._sent_all.wait(PATIENT_S)

    def finish(self) -> None:
        """Each has come back, once and in order."""
        self._rest()
        wait_until(lambda: len(self.answers) >= self.sent, f"answers to all of {self.sent}")
        self.close()
        assert self.answers == list(range(self.sent))

    def close(self) -> None:
        self._going = False
        self._thread.join(10)
        self._near.close()
        self._far.close()


@pytest.fixture
def pair(host: Host) -> tuple[Guest, Guest]:
    return host.guest("10.0.0.1", [UDP]), host.guest("10.0.0.2", [ASKED])


@pytest.fixture
def talk(pair: tuple[Guest, Guest]) -> Iterator[Talk]:
    made = Talk(*pair)
    try:
        made.run_on()
        yield made
    finally:
        if made._going:
            made.close()


def restart(host: Host, **options: object) -> None:
    """As another start of the agent would, perhaps with other sizes of tables."""
    if host.driver._running is not None:
        host.run(host.driver.stop)
    host.driver = EbpfDriver()
    host.options.update(options)
    host.start()


def packets(host: Host, guest: Guest) -> dict[str, int]:
    counters = host.run(lambda: dict(host.driver.port(guest.ref).counters))
    return {name: counters[name] for name in ("packets_from", "packets_to", "bytes_from", "bytes_to")}


def assert_counted_once(host: Host, guest: Guest, talk: Talk) -> None:
    """All that it sent, and a few ARP packets now and then."""
    assert talk.sent <= packets(host, guest)["packets_from"] <= talk.sent + 50


def connection(host: Host, guest: Guest) -> tuple[int, int]:
    """Id of the guest's one connection, and packets that it has sent on it."""
    (table,) = host.run(lambda: list(host.driver.dump(guest.ref, CONNTRACK.name)))
    assert table.columns is not None and len(table) == 1
    return int(table.columns["id"][0]), int(table.columns["packets_from"][0])


def generations(host: Host) -> list[str]:
    pins = host.driver._running.pins.root if host.driver._running else None
    return sorted(path.name for path in pins.iterdir() if path.name.startswith("maps")) if pins else []


def test_larger_tables_are_taken_over_under_traffic(host: Host, pair: tuple[Guest, Guest], talk: Talk) -> None:
    """And smaller ones again. The connection is the same one, and everything counted once."""
    for slots, l2 in ((64, 8192), (16, 2048)):
        number, before, ports = *connection(host, pair[0]), packets(host, pair[0])
        restart(host, slots=slots, l2=l2)
        talk.run_on()
        assert host.driver._running is not None and host.driver._running.kernel.slots == slots
        assert generations(host) == ["maps"]
        after = packets(host, pair[0])
        assert all(after[name] >= ports[name] + 300 for name in ports), f"{ports} -> {after}"
        same, sent = connection(host, pair[0])
        assert same == number and sent >= before + 300
    talk.finish()
    number, sent = connection(host, pair[0])
    assert sent == talk.sent
    assert_counted_once(host, pair[0], talk)
    assert host.run(lambda: host.driver.dump(pair[0].ref, "acl").__next__().records)[0]["hits"] == 1


@pytest.mark.parametrize("moment", ["prepare", "last_changes"])
def test_what_fails_before_the_turn_leaves_the_old_programs(
    host: Host, talk: Talk, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(real: Callable[..., None]) -> Callable[..., None]:
        def after(self: Takeover, *arguments: object) -> None:
            real(self, *arguments)
            raise KernelError("as if", 5)

        return after

    with monkeypatch.context() as patch:
        patch.setattr(Takeover, moment, fails(getattr(Takeover, moment)))
        with pytest.raises(KernelError, match="as if"):
            restart(host, slots=64)
    talk.run_on()
    restart(host, slots=32)
    assert generations(host) == ["maps"]
    talk.run_on()
    talk.finish()


@pytest.mark.parametrize("moment", ["replaced", "opened"])
def test_an_agent_that_dies_after_the_turn_finishes_later(
    host: Host, pair: tuple[Guest, Guest], talk: Talk, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost and nothing counted twice, wherever it stopped."""
    step = {"replaced": "_count_held", "opened": "_account"}[moment]

    def dies(*_: object) -> None:
        raise KernelError("as if dead", 5)

    with monkeypatch.context() as patch:
        patch.setattr(Takeover, step, dies)
        with pytest.raises(KernelError, match="as if dead"):
            restart(host, slots=64)
    restart(host, slots=64)
    assert generations(host) == ["maps"]
    talk.run_on()
    talk.finish()
    assert connection(host, pair[0])[1] == talk.sent
    assert_counted_once(host, pair[0], talk)


def held(host: Host, guest: Guest) -> int:
    status = host.run(lambda: host.driver.port(guest.ref))
    return status.held_to + status.held_from


def test_what_has_no_place_is_refused_and_the_old_programs_go_on(
    host: Host, pair: tuple[Guest, Guest], talk: Talk
) -> None:
    for options, error, words in (
        ({"slots": 2}, NotReady, r"slot 2 is in use and 2 are configured"),
        ({"networks": 1}, UnsupportedKind, r"table networks do not fit"),
    ):
        was = {name: host.options[name] for name in options}
        with pytest.raises(error, match=words) as raised:
            restart(host, **options)
        assert "the programs that were here go on" in raised.value.hint
        host.options.update(was)
        talk.run_on()
    restart(host)
    host.run(lambda: host.driver.hold(pair[0].ref))
    wait_until(lambda: held(host, pair[0]) >= 100, "frames are held")
    with talk.resting():
        with pytest.raises(NotReady, match="takes part in a migration"):
            restart(host, slots=64)
        restart(host, slots=32)
    host.run(lambda: host.driver.resume(pair[0].ref))
    talk.finish()


def test_a_hundred_thousand_connections_stand_for_a_moment(
    host: Host, talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    patient = dict.fromkeys(TIMEOUTS, 10**9)
    other = host.guest("10.0.0.3", connections_max=131_072, timeouts_ms=patient)
    table = connections(MANY)
    table["state"][table["state"] == STATES["NONE"]] = STATES["ESTABLISHED"]  # of TCP it has no timeout: swept at once
    host.run(lambda: host.driver.load(other.ref, Table(CONNTRACK.name, columns=table)))
    before = host.run(lambda: sum(len(t) for t in host.driver.dump(other.ref, CONNTRACK.name)))
    with caplog.at_level(logging.INFO, "datapath"):
        restart(host, slots=64)
    said = next(text for text in caplog.messages if text.startswith("switch taken over"))
    print(said)
    assert re.match(rf"switch taken over: 3 ports stood for [0-9.]+ ms, {before + 2} connections", said)
    assert host.run(lambda: sum(len(t) for t in host.driver.dump(other.ref, CONNTRACK.name))) == before
    talk.run_on()
    talk.finish()
