"""hooks/qemu as libvirtd runs it, against a real unix socket: what it lets through, refuses, prints, never fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HOOK = Path(__file__).parents[2] / "hooks" / "qemu"
XML = """<domain type='qemu'><name>shop</name><metadata><ports xmlns="urn:vm-netstate-migrator:ports:1">
<port mac="52:54:00:00:00:10" network="blue"/></ports></metadata></domain>"""
NEVER_FAIL = ("started", "stopped", "release", "reconnect", "attach", "something-new")


class Agent:
    """Answers each connection with `answer(request)`: text to send, None to hang up without a word."""

    def __init__(self, path: Path, answer: Callable[[dict[str, Any]], str | None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                line = lines.readline()
                if not line:
                    continue
                self.requests.append(json.loads(line))
                said = self._answer(self.requests[-1])
                if said is not None:
                    try:
                        connection.sendall(said.encode())
                    except OSError:  # the hook gave up
                        continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """The hook with its configuration file in a directory of the test's own: its environment is not looked at."""
    copy = tmp_path / "90-migrator"
    copy.write_text(HOOK.read_text().replace("/etc/migrator/hook.conf", str(tmp_path / "hook.conf")))
    copy.chmod(0o755)
    (tmp_path / "hook.conf").write_text(f"# where the agent is\nsocket = {tmp_path}/hook.sock\nwait_s = 1.5\n")
    return copy


@contextmanager
def agent(hook: Path, answer: Callable[[dict[str, Any]], str | None]) -> Iterator[Agent]:
    made = Agent(hook.parent / "hook.sock", answer)
    try:
        yield made
    finally:
        made.close()


def call(hook: Path, operation: str, xml: str = XML, sub: str = "begin") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [hook, "shop", operation, sub, "-"], input=xml, text=True, capture_output=True, timeout=20, check=False, env={}
    )


def says(**reply: Any) -> Callable[[dict[str, Any]], str]:
    return lambda _: json.dumps(reply) + "\n"


def test_asks_and_goes_on(hook: Path) -> None:
    with agent(hook, says(ok=True)) as there:
        done = call(hook, "prepare")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = {"op": "hook", "domain": "shop", "operation": "prepare", "sub": "begin", "extra": "-", "xml": XML}
    assert there.requests == [wanted]


@pytest.mark.parametrize("operation", ["migrate", "prepare", "start", "restore"])
def test_refusal_is_one_line_for_the_operator(hook: Path, operation: str) -> None:
    with agent(hook, says(ok=False, reason="host h2 lacks network blue\n(migrator network add)")):
        done = call(hook, operation)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "migrator: host h2 lacks network blue (migrator network add)\n"


@pytest.mark.parametrize("operation", NEVER_FAIL)
def test_what_ends_or_goes_on_never_fails(hook: Path, operation: str) -> None:
    with agent(hook, says(ok=False, reason="no")) as there:
        done = call(hook, operation, sub="end")
    assert done.returncode == 0 and there.requests[0]["sub"] == "end"
    (hook.parent / "hook.sock").unlink()
    assert call(hook, operation).returncode == 0  # and nobody there


@pytest.mark.parametrize("operation", ["migrate", "prepare", "start"])
def test_no_agent_refuses_and_names_the_host(hook: Path, operation: str) -> None:
    done = call(hook, operation)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"start the migrator agent on {os.uname().nodename}" in done.stderr


def test_no_agent_lets_a_restore_go_on_to_prepare(hook: Path) -> None:
    assert call(hook, "restore").returncode == 0


@pytest.mark.parametrize("xml", ["", "<domain><name>shop</name></domain>", "no xml at all \x00\udcff"])
@pytest.mark.parametrize("operation", ["migrate", "prepare", "stopped"])
def test_others_vms_are_nobodys_business(hook: Path, operation: str, xml: str) -> None:
    done = subprocess.run(
        [hook, "shop", operation, "begin", "-"],
        input=xml.encode(errors="surrogateescape"),
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("operation", ["migrate", "restore"])
def test_prints_another_xml_where_libvirt_reads_it(hook: Path, operation: str) -> None:
    with agent(hook, says(ok=True, xml="<domain>é</domain>")):
        assert call(hook, operation).stdout == "<domain>é</domain>"


def test_prints_nothing_where_libvirt_does_not(hook: Path) -> None:
    with agent(hook, says(ok=True, xml="<domain/>")):
        assert call(hook, "prepare").stdout == ""


@pytest.mark.parametrize("answer", [None, "", "no json\n", "[]\n", '{"ok": true}', "\xff\n"])
def test_a_bad_answer_refuses_a_start_and_nothing_else(hook: Path, answer: str | None) -> None:
    with agent(hook, lambda _: answer):
        assert call(hook, "start").returncode == 1
        assert call(hook, "release").returncode == 0


def test_an_agent_that_does_not_answer_is_not_waited_for_longer_than_configured(hook: Path) -> None:
    release = threading.Event()
    with agent(hook, lambda _: str(release.wait(20))):
        began = time.monotonic()
        done = call(hook, "migrate")
        assert 1.4 < time.monotonic() - began < 4
        release.set()
    assert done.returncode == 1 and "takes too long" in done.stderr


def test_closed_standard_input_and_missing_arguments(hook: Path) -> None:
    closed = subprocess.run(["/bin/sh", "-c", f"exec {hook} shop prepare begin - <&-"], check=False, timeout=20)
    assert closed.returncode == 0
    assert subprocess.run([hook], stdin=subprocess.DEVNULL, check=False, timeout=20).returncode == 0


@pytest.mark.parametrize(("operation", "code"), [("prepare", 1), ("release", 0)])
def test_sigterm_ends_it(hook: Path, operation: str, code: int) -> None:
    asked, release = threading.Event(), threading.Event()

    def answer(_: dict[str, Any]) -> None:
        asked.set()
        release.wait(20)

    with agent(hook, answer):
        process = subprocess.Popen([hook, "shop", operation, "begin", "-"], stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(XML)
        process.stdin.close()
        assert asked.wait(10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == code
        release.set()


def test_more_xml_than_can_be_is_read_to_its_end_and_refused(hook: Path) -> None:
    done = call(hook, "prepare", XML + " " * (5 << 20))
    assert done.returncode == 1 and "more than 4194304 bytes" in done.stderr


@pytest.mark.parametrize(
    "layout", ["hooks/qemu", "hooks/qemu.d/90-migrator", "hooks/qemu.d/shop/prepare/begin/migrator"]
)
def test_any_layout(hook: Path, layout: str) -> None:
    """As libvirt's only hook, as one of its qemu.d, and below a dispatcher that passes on arguments and input."""
    place = hook.parent / layout
    place.parent.mkdir(parents=True)
    place.write_text(hook.read_text())
    place.chmod(0o755)
    with agent(hook, says(ok=False, reason="no room")) as there:
        assert call(place, "prepare").returncode == 1
    assert len(there.requests) == 1


def test_it_needs_nothing_but_the_standard_library_and_is_quick(hook: Path) -> None:
    """For a VM that is not ours it costs an interpreter's start: 25 ms of CPU measured."""
    before = os.times()
    for _ in range(5):
        assert call(hook, "started", "<domain/>").returncode == 0
    after = os.times()
    assert (after.children_user + after.children_system - before.children_user - before.children_system) / 5 < 0.1
