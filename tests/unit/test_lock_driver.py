"""libvirt's lock driver as libvirtd calls it: loaded into this process, an agent played by the test at its socket."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import libvirt
import pytest

TREE = Path(__file__).parents[2]
VM = "6f0c4d2e-7a55-4c0e-9d5e-3f2b8a1c0d01"
REGISTER_ONLY = 1
AT_ONCE_S = 0.2
WAIT_S = 0.5  # 2 s on a host


class Value(ctypes.Union):
    _fields_ = (("ui", ctypes.c_uint), ("str", ctypes.c_char_p), ("uuid", ctypes.c_ubyte * 16))


class Param(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("key", ctypes.c_char_p), ("value", Value))


class Manager(ctypes.Structure):
    _fields_ = (("driver", ctypes.c_void_p), ("private", ctypes.c_void_p))


Pointer, Int, Unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint


class Table(ctypes.Structure):
    """virLockDriverImpl."""

    _fields_ = (
        ("version", Unsigned),
        ("flags", Unsigned),
        ("init", ctypes.CFUNCTYPE(Int, Unsigned, ctypes.c_char_p, Unsigned)),
        ("deinit", ctypes.CFUNCTYPE(Int)),
        (
            "new",
            ctypes.CFUNCTYPE(Int, ctypes.POINTER(Manager), Unsigned, ctypes.c_size_t, ctypes.POINTER(Param), Unsigned),
        ),
        ("free", ctypes.CFUNCTYPE(None, ctypes.POINTER(Manager))),
        ("add_resource", ctypes.CFUNCTYPE(Int, Pointer, Unsigned, ctypes.c_char_p, ctypes.c_size_t, Pointer, Unsigned)),
        (
            "acquire",
            ctypes.CFUNCTYPE(Int, ctypes.POINTER(Manager), ctypes.c_char_p, Unsigned, Int, ctypes.POINTER(Int)),
        ),
        ("release", ctypes.CFUNCTYPE(Int, ctypes.POINTER(Manager), ctypes.POINTER(Pointer), Unsigned)),
        ("inquire", ctypes.CFUNCTYPE(Int, ctypes.POINTER(Manager), ctypes.POINTER(Pointer), Unsigned)),
    )


class LockDriver:
    """The driver, with the VM that it is asked for. The agent's socket and the marks are in `run`."""

    def __init__(self, library: Path, run: Path) -> None:
        self.run = run
        (run / "strict").mkdir(exist_ok=True)
        self.table = Table.in_dll(ctypes.CDLL(str(library)), "virLockDriverImpl")
        assert self.table.version == 1000000
        assert self.table.init(1000000, b"/etc/libvirt/qemu-migrator.conf", 0) == 0
        self.manager = Manager()
        raw = (ctypes.c_ubyte * 16)(*uuid.UUID(VM).bytes)
        given = [(7, b"uuid", Value(uuid=raw)), (0, b"name", Value(str=b'a "name"')), (4, b"pid", Value(ui=77))]
        params = (Param * 3)(*given)
        assert self.table.new(ctypes.byref(self.manager), 0, 3, params, 0) == 0

    def mark(self, way: str) -> Path:
        path = self.run / "strict" / f"{VM}.{way}"
        path.touch()
        return path

    def acquire(self, flags: int = 0) -> bool:
        fd = ctypes.c_int(5)
        answer = self.table.acquire(ctypes.byref(self.manager), None, flags, 0, ctypes.byref(fd))
        assert fd.value == -1
        return bool(answer == 0)

    def release(self) -> bool:
        state = ctypes.c_void_p(1)
        answer = self.table.release(ctypes.byref(self.manager), ctypes.byref(state), 0)
        assert state.value is None
        return bool(answer == 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, compiled as it is for a host but for the path of its configuration and its patience."""
    place = tmp_path_factory.mktemp("lock")
    (place / "hook.conf").write_text(f'wait_s = 5\n  socket = "{place}/hook.sock"  # not the usual one\n')
    environment = {**os.environ, "CPPFLAGS": f'-DCONFIG="{place}/hook.conf" -DWAIT_MS={WAIT_S * 1e3:.0f}'}
    subprocess.run([TREE / "tools" / "lock_driver", place / "migrator.so"], check=True, env=environment)
    return place / "migrator.so"


@pytest.fixture
def driver(library: Path) -> Iterator[LockDriver]:
    made = LockDriver(library, library.parent)
    yield made
    made.table.free(ctypes.byref(made.manager))
    for left in (made.run / "strict").iterdir():
        left.unlink()
    (made.run / "hook.sock").unlink(missing_ok=True)


class Agent:
    """Answers each connection with what `answers` gives, one after the other; None: hangs up, "": says nothing."""

    def __init__(self, run: Path, *answers: str | None, before: Callable[[], object] = lambda: None) -> None:
        self.asked: list[dict[str, object]] = []
        self._answers = list(answers)
        self._before = before
        self._listener = socket.socket(socket.AF_UNIX)
        path = run / "hook.sock"
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen()
        self._silent: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._answers:
            with suppress(OSError):
                taken, _ = self._listener.accept()
                self._answer(taken, self._answers.pop(0))

    def _answer(self, taken: socket.socket, answer: str | None) -> None:
        with taken.makefile("rb") as lines:
            self.asked.append(json.loads(lines.readline()))
        self._before()
        if answer == "":
            return self._silent.append(taken)
        with closing(taken):
            if answer is not None:
                taken.sendall(answer.encode())
        return None

    def close(self) -> None:
        self._answers.clear()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._silent:
            one.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


YES = '{"ok": true}\n'
NO = '{"ok": false, "reason": "the \\"last\\" of it\\nhas not come"}\n'


def timed(call: Callable[[], bool]) -> tuple[bool, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


@pytest.mark.parametrize("marks", [(), ("leaving",), ("arriving", "leaving")])
def test_a_machine_that_is_only_made_is_nobodys_business(driver: LockDriver, marks: tuple[str, ...]) -> None:
    for way in marks:
        driver.mark(way)
    assert timed(lambda: driver.acquire(REGISTER_ONLY)) < (True, AT_ONCE_S)


def test_without_a_mark_nobody_is_asked(driver: LockDriver) -> None:
    with closing(Agent(driver.run, NO, NO)) as agent:
        (driver.run / "strict" / f"{uuid.uuid4()}.arriving").touch()
        assert driver.acquire() and driver.release()
        assert not agent.asked


def test_who_arrives_waits_for_the_agents_word(driver: LockDriver) -> None:
    driver.mark("arriving")
    with closing(Agent(driver.run, YES, NO)) as agent:
        assert driver.acquire()
        assert not driver.acquire()
        assert agent.asked == [{"op": "acquire", "uuid": VM, "pid": 77}] * 2
    assert driver.release(), "nobody is asked when an arriving VM stops"


def test_a_refusal_is_told_to_libvirts_caller(driver: LockDriver, library: Path) -> None:
    """By the function of libvirt's own, when it is there."""
    heard = library.parent / "report.c"
    heard.write_text(
        "#include <stdarg.h>\n#include <stdio.h>\nchar heard[600]; int codes[2];\n"
        "void virReportErrorHelper(int d, int c, const char *f, const char *n, unsigned long l, const char *t, ...)\n"
        "{ va_list a; (void)f; (void)n; (void)l; codes[0] = d; codes[1] = c; va_start(a, t);\n"
        "  vsnprintf(heard, sizeof heard, t, a); va_end(a); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", heard.with_suffix(".so"), heard], check=True)
    report = ctypes.CDLL(str(heard.with_suffix(".so")), ctypes.RTLD_GLOBAL)
    driver.mark("arriving")
    with closing(Agent(driver.run, NO)):
        assert not driver.acquire()
    text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(report, "heard"))).decode()
    assert text == f'VM {VM} must not run here: the "last" of it has not come'
    assert list((ctypes.c_int * 2).in_dll(report, "codes")) == [
        libvirt.VIR_FROM_LOCKING,
        libvirt.VIR_ERR_OPERATION_FAILED,
    ]


@pytest.mark.parametrize("answer", [None, "", "{}\n", "x" * 5000 + "\n", '{"ok":true}\n'])
def test_rule_an_arrival_without_a_word_is_refused(driver: LockDriver, answer: str | None) -> None:
    driver.mark("arriving")
    with closing(Agent(driver.run, *[answer] * 500)):
        refused, seconds = timed(driver.acquire)
    assert not refused and WAIT_S * 0.9 < seconds < WAIT_S + 0.5


def test_no_agent_and_an_arrival(driver: LockDriver) -> None:
    driver.mark("arriving")
    allowed, seconds = timed(driver.acquire)
    assert not allowed and seconds < WAIT_S + 0.5


def test_an_agent_that_comes_back_in_time_answers(driver: LockDriver) -> None:
    driver.mark("arriving")
    with closing(Agent(driver.run, None, None, YES)) as agent:
        assert driver.acquire()
        assert len(agent.asked) == 3


def test_an_agent_that_has_committed_and_died_holds_nobody(driver: LockDriver) -> None:
    mark = driver.mark("arriving")
    with closing(Agent(driver.run, None, before=mark.unlink)):
        assert timed(driver.acquire) < (True, AT_ONCE_S)


@pytest.mark.parametrize("answer", [YES, NO, None, "{}\n"])
def test_who_leaves_is_told_and_never_refused(driver: LockDriver, answer: str | None) -> None:
    driver.mark("leaving")
    with closing(Agent(driver.run, answer, answer)) as agent:
        assert timed(driver.release) < (True, AT_ONCE_S)
        assert timed(driver.acquire) < (True, AT_ONCE_S)
        assert [one["op"] for one in agent.asked] == ["release", "acquire"]


def test_an_agent_that_says_nothing_keeps_a_leaving_vm_no_longer_than_is_said(driver: LockDriver) -> None:
    driver.mark("leaving")
    with closing(Agent(driver.run, "")):
        going, seconds = timed(driver.release)
    assert going and WAIT_S * 0.9 < seconds < WAIT_S + 0.5


def test_nothing_is_left_open(driver: LockDriver) -> None:
    driver.mark("arriving")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(Agent(driver.run, *[YES] * 20)):
        for _ in range(20):
            assert driver.acquire()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2, "the listener, and one that is being closed"


def test_another_interface_is_refused(driver: LockDriver) -> None:
    assert driver.table.init(2000000, None, 0) == -1
    assert driver.table.init(1001000, None, 0) == 0
