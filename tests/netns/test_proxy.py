# SPDX-License-Identifier: GPL-2.0-only
"""The proxy of the crash matrix does to connections what it is told, or the matrix would prove nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from migrator.lab.processes import wait_until

PATIENT_S = 10.0


class Proxied:
    """An echo on loopback, and the proxy before it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.echo = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.heard = b""  # what the echo read last
        threading.Thread(target=self._accept, daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        setup = {"link": {"listen": list(self.address), "to": list(self.echo.getsockname())}}
        command = [sys.executable, "-m", "tests.netns.proxy", json.dumps(setup)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = stack.enter_context(subprocess.Popen(command, text=True, bufsize=1, **pipes))
        stack.callback(self.process.kill)
        self.answer()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.echo.accept()
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                self.heard = data
                connection.sendall(data)
            connection.sendall(b"end")

    def answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def ask(self, **order: object) -> dict[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        return self.answer()

    def mode(self, mode: str, value: float = 0) -> None:
        assert self.ask(op="mode", link="link", mode=mode, value=value) == {}

    def connect(self) -> socket.socket:
        made = socket.create_connection(self.address, PATIENT_S)
        made.settimeout(PATIENT_S)
        return made


@pytest.fixture
def proxied() -> Iterator[Proxied]:
    with contextlib.ExitStack() as stack:
        yield Proxied(stack)


def _said(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(65536)


def test_it_passes_and_delays_and_throttles(proxied: Proxied) -> None:
    with proxied.connect() as client:
        assert _said(client, b"one") == b"one"
        for mode, value in (("delay", 150), ("throttle", 20)):  # "two" there and back
            proxied.mode(mode, value)
            began = time.monotonic()
            assert _said(client, b"two") == b"two"
            assert time.monotonic() - began >= 0.29
        proxied.mode("pass")
        assert _said(client, b"three") == b"three"


def test_it_corrupts(proxied: Proxied) -> None:
    with proxied.connect() as client:
        proxied.mode("corrupt")
        assert _said(client, b"axa") == b"axa"  # turned there and back again
        assert proxied.heard == b"aha"
    assert proxied.ask(op="mode", link="link", mode="worse")["error"]


def test_it_stalls_and_goes_on(proxied: Proxied) -> None:
    with proxied.connect() as client:
        assert _said(client, b"one") == b"one"
        proxied.mode("stall")
        client.sendall(b"two")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(100)
        client.settimeout(PATIENT_S)
        proxied.mode("pass")
        assert client.recv(100) == b"two"


def test_it_cuts_what_there_is_and_what_comes(proxied: Proxied) -> None:
    with proxied.connect() as client:
        assert _said(client, b"one") == b"one"
        proxied.mode("cut")
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with pytest.raises(ConnectionResetError), proxied.connect() as client:
        client.recv(100)
    proxied.mode("pass")
    with proxied.connect() as client:
        assert _said(client, b"three") == b"three"
    wait_until("all are gone", lambda: proxied.ask(op="status")["link"]["connections"] == 0)


def test_it_ends_one_direction_only(proxied: Proxied) -> None:
    with proxied.connect() as client:
        assert _said(client, b"one") == b"one"
        proxied.mode("half")
        assert client.recv(100) == b"end", "the server saw the end, and its answer still comes"
