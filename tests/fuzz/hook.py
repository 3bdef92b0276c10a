"""Target: hooks/qemu, with what libvirtd writes to it, its configuration, and an agent that answers anything."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

SOURCE = Path(__file__).parents[2] / "hooks" / "qemu"
OPERATIONS = ("migrate", "prepare", "start", "restore", "started", "stopped", "release", "reconnect", "attach", "")
CUT = b"\0"
"""Between what libvirtd sends, the configuration file, and the agent's answer."""


class _Socket:
    """An agent that gives `answer`, cut into pieces, and hangs up."""

    answer = b""

    def __init__(self, *_: object) -> None:
        self._left = self.answer

    def __enter__(self) -> _Socket:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        assert seconds == seconds  # not a number

    def connect(self, address: object) -> None:
        assert isinstance(address, str)

    def sendall(self, request: bytes) -> None:
        fields = json.loads(request)
        assert request.endswith(b"\n") and request.count(b"\n") == 1 and fields["op"] == "hook"

    def recv(self, _: int) -> bytes:
        part, self._left = self._left[:5000], self._left[5000:]
        return part


class _Hook:
    def __init__(self) -> None:
        self._module: ModuleType | None = None

    def module(self) -> ModuleType:
        """Not by an ordinary import: it is a program, and has no suffix."""
        if self._module is None:
            loader = SourceFileLoader("migrator_qemu_hook", str(SOURCE))
            spec = importlib.util.spec_from_loader(loader.name, loader)
            assert spec is not None
            written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
            self._module = importlib.util.module_from_spec(spec)
            loader.exec_module(self._module)
            sys.dont_write_bytecode = written
        return self._module

    def run(self, data: bytes) -> None:
        """Never raises; what does not begin something is never refused; at most one line reaches the operator."""
        if not data:
            return
        operation, rest = OPERATIONS[data[0] % len(OPERATIONS)], data[1:]
        xml, _, rest = rest.partition(CUT)
        conf, _, answer = rest.partition(CUT)
        out, err = io.StringIO(), io.StringIO()
        code = self._main(["qemu", "shop", operation, "begin", "-"], xml, conf, answer, out, err)
        assert code in (0, 1), code
        assert code == 0 or operation in ("migrate", "prepare", "start", "restore"), f"{operation} was refused"
        assert (err.getvalue().count("\n"), bool(err.getvalue())) in ((0, False), (1, True)), err.getvalue()
        assert not out.getvalue() or operation in ("migrate", "restore")

    def _main(
        self, arguments: list[str], xml: bytes, conf: bytes, answer: bytes, out: io.StringIO, err: io.StringIO
    ) -> int:
        module: Any = self.module()
        answering = type("Answering", (_Socket,), {"answer": answer})
        stdin = io.TextIOWrapper(io.BytesIO(xml))

        def opened(*_: object, **options: Any) -> io.TextIOWrapper:
            return io.TextIOWrapper(io.BytesIO(conf), **options)

        with (
            mock.patch("socket.socket", answering),
            mock.patch("signal.signal"),
            mock.patch("syslog.syslog"),
            mock.patch("syslog.openlog"),
            mock.patch.object(module, "open", opened, create=True),
            mock.patch("sys.stdin", stdin),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            return int(module.main(arguments))

    def seeds(self) -> Iterator[bytes]:
        xml = b"<domain><metadata>urn:vm-netstate-migrator:ports:1</metadata></domain>"
        conf = b"# where\nsocket = /run/x.sock\nwait_s = 1.5\n"
        for number, answer in enumerate(
            (
                b'{"ok": true}\n',
                b'{"ok": false, "reason": "host h2 lacks network blue"}\n',
                b'{"ok": true, "xml": "<domain/>"}\n',
                b"[1]\n",
                b"",
            )
        ):
            yield bytes((number,)) + xml + CUT + conf + CUT + answer


hook = _Hook()
