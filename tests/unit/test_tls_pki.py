# SPDX-License-Identifier: GPL-2.0-only
"""`migrator pki`, `doctor` and the command's own file; and no secret in anything that is printed, logged or sent."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from migrator._pb import migrator_pb2 as pb
from migrator.agent.local import checkpoint_of
from migrator.cli.main import run
from migrator.security import authority, transport
from migrator.security.files import read
from migrator.security.identity import Identity, Role
from migrator.security.settings import folder

from .certified import certified
from .pair import VM, eventually, world


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    capfd.readouterr()
    yield capfd


def test_from_nothing_to_a_renewed_certificate(tmp_path: Path, said: pytest.CaptureFixture[str]) -> None:
    ca = ["--ca", str(tmp_path / "pki")]
    out = tmp_path / "h1"
    assert run(["pki", "init", *ca, "--name", "ours"]) == 0
    assert "CN=ours" in said.readouterr().out
    assert (
        run(["pki", "issue", "agent", "h1", *ca, "--out", str(out), "--alt", "192.0.2.1", "--days", "7", "--json"]) == 0
    )
    issued = json.loads(said.readouterr().out)
    assert (issued["identity"], issued["issuer"], issued["days_left"]) == ("migrator://agent/h1", "CN=ours", 6)
    assert "h1.agent.migrator.internal" in issued["names"] and "192.0.2.1" in issued["names"]
    assert run(["pki", "renew", str(out), *ca]) == 0
    assert "migrator://agent/h1" in said.readouterr().out
    assert run(["pki", "show", str(out), "--json"]) == 0
    renewed = json.loads(said.readouterr().out)
    assert renewed["identity"] == issued["identity"] and renewed["serial"] != issued["serial"]
    assert renewed["names"] == issued["names"] and renewed["days_left"] == 364
    assert read(folder(out)).identity == Identity(Role.AGENT, "h1")
    assert run(["pki", "revoke", str(out), *ca]) == 0
    assert said.readouterr().out.strip() == str(tmp_path / "pki" / "revoked.crl")


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["issue", "agent", "h1", "--ca", "{}/none"], r"ca\.crt: No such file.*pki init", 8),
        (["issue", "agent", "coordinator.migrator.internal", "--ca", "{}/pki"], r"say roles", 8),
        (["issue", "root", "h1", "--ca", "{}/pki"], r"root", 2),
        (["init", "--ca", "{}/pki"], r"authority already", 8),
        (["renew", "{}/pki", "--ca", "{}/pki"], r"tls\.crt: No such file", 8),
        (["show", "{}/none"], r"No such file", 8),
        (["show", "{}/text"], r"no certificate in PEM", 8),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    tmp_path: Path, said: pytest.CaptureFixture[str], arguments: list[str], says: str, code: int
) -> None:
    authority.create(tmp_path / "pki")
    (tmp_path / "text").write_text("x")
    assert run(["pki", *(word.format(tmp_path) for word in arguments)]) == code
    error = said.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1 and error.startswith("migrator: ")


def test_files_belong_to_whom_their_folder_belongs_to(tmp_path: Path) -> None:
    """A coordinator runs as a user of its own, who has to read the key; root renews it."""
    place = tmp_path / "state"
    place.mkdir(mode=0o755)
    try:
        os.chown(place, 12345, 12345)
    except PermissionError:
        pytest.skip("needs root")
    ca = authority.create(tmp_path / "lib" / "pki")
    assert stat.S_IMODE((tmp_path / "lib").stat().st_mode) == 0o755, "what is beside it may be others'"
    ca.issue(Identity(Role.COORDINATOR, "c"), place / "tls")
    ca.renew(place / "tls")
    for path in (place / "tls", *(place / "tls").iterdir()):
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12345), path
    assert stat.S_IMODE((place / "tls" / "tls.key").stat().st_mode) == 0o600


FILES = ("ca.crt", "tls.crt", "tls.key")


def agent_file(tmp_path: Path, tls: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(f'[agent]\nhost = "h1"\nlisten = "127.0.0.1:0"\n[driver]\nname = "dummy"\n[tls]\n{tls}\n')
    return path


@pytest.mark.parametrize(
    ("days", "code", "says"),
    [(365, 0, ""), (20, 0, "ends in 19 days: renew it"), (-1, 16, "expired at")],
)
def test_doctor_looks_at_the_certificate(
    tmp_path: Path, said: pytest.CaptureFixture[str], days: int, code: int, says: str
) -> None:
    out = tmp_path / "tls"
    begins = datetime.now(UTC) - timedelta(days=10)
    ca = authority.create(tmp_path / "pki")
    ca.issue(Identity(Role.AGENT, "h1"), out, begins=begins, lifetime=timedelta(days=10 + days, minutes=-1))
    paths = "\n".join(f'{key} = "{out / name}"' for key, name in zip(("ca", "certificate", "key"), FILES, strict=True))
    assert run(["doctor", "--config", str(agent_file(tmp_path, paths)), "--json"]) == code
    row = next(row for row in json.loads(said.readouterr().out) if row["feature"] == "certificate")
    assert row["present"] == (code == 0) and says in row["hint"] and bool(row["hint"]) == bool(says)


def test_doctor_says_when_there_is_none(tmp_path: Path, said: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--config", str(agent_file(tmp_path, "insecure = true")), "--json"]) == 0
    row = next(row for row in json.loads(said.readouterr().out) if row["feature"] == "certificate")
    assert row["hint"] == "none: connections are not encrypted"


def test_the_command_finds_coordinator_and_certificate_in_its_file(
    tmp_path: Path, said: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with certified(tmp_path) as it:
            tls = it.tls("viewer", "v")
            paths = "".join(f'{name} = "{getattr(tls, name)}"\n' for name in ("ca", "certificate", "key"))
            (tmp_path / "cli.toml").write_text(f'coordinator = "{it.address}"\n[tls]\n{paths}')
            monkeypatch.setenv("MIGRATOR_CONFIG", str(tmp_path / "cli.toml"))
            assert await asyncio.to_thread(run, ["host", "list"]) == 0
            assert await asyncio.to_thread(run, ["host", "remove", "h1"]) == 9
            assert "migrator://viewer/v may not call Coordinator/Remove" in said.readouterr().err
            it.tls("operator", "o")
            assert await asyncio.to_thread(run, ["--tls", str(tmp_path / "operator-o"), "host", "remove", "h1"]) == 4
            (tmp_path / "cli.toml").write_text(f'coordinator = "{it.address}"\n')
            assert await asyncio.to_thread(run, ["host", "list"]) == 32
            assert "our certificate is missing" in said.readouterr().err
            (tmp_path / "cli.toml").write_text('[tls]\nca = "/x"\n')
            assert await asyncio.to_thread(run, ["host", "list"]) == 3
            assert re.search(r"cli\.toml.*belong together", said.readouterr().err)

    asyncio.run(scenario())


def secrets(directory: Path) -> dict[str, list[bytes]]:
    """What of each key must be seen nowhere: lines of its file, and the number itself in hexadecimal and as bytes."""
    found: dict[str, list[bytes]] = {}
    for path in directory.rglob("*.key"):
        pem = path.read_bytes()
        key = load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        number = key.private_numbers().private_value
        raw = number.to_bytes(32, "big")
        lines = [line for line in pem.splitlines() if not line.startswith(b"-----")]
        found[str(path)] = [*lines[1:], raw, raw.hex().encode(), str(number).encode()]
    return found


def test_no_key_and_no_token_is_printed_logged_reported_or_in_a_snapshot(
    tmp_path: Path, said: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bytes] = []
    tokens: list[bytes] = []
    monkeypatch.setattr(transport, "LOOK_S", 0.0)  # what changed a moment ago is seen at the next look

    async def scenario() -> None:
        async with world(tmp_path, "a", "b", tls=True) as w:
            w.fill("a", 100)
            w.hypervisor.converged = False
            migration = await w.migrate("b")
            await eventually(lambda: len(list(w.agents["a"].ends)) == 1)
            tokens.extend(end.order.token for end in w.agents["a"].ends)
            shown.extend([chunk async for chunk in checkpoint_of(w.agents["a"], VM)])
            monkeypatch.setenv("MIGRATOR_COORDINATOR", w.address)
            w.tls("operator", "o"), w.tls("viewer", "v")
            for role in ("operator-o", "viewer-v"):
                for words in (
                    "host list",
                    "migration list",
                    f"migration show {migration}",
                    "port list",
                    "vm migrate x b",
                ):
                    await asyncio.to_thread(
                        run, ["--tls", str(tmp_path / "tls" / role), *words.split(), "--json", "-vv"]
                    )
            w.authority and w.authority.renew(tmp_path / "tls" / "agent-a")
            (tmp_path / "tls" / "agent-b" / "tls.key").write_bytes(
                (tmp_path / "tls" / "agent-a" / "tls.key").read_bytes()
            )
            w.agents["a"].transport.material(), w.agents["b"].transport.material()
            w.hypervisor.converged = True
            report = await w.finish(migration)
            assert report.outcome == "complete"
            shown.append(repr([w.agents["a"].transport.material(), w.authority, w.agents["a"].config]).encode())
            shown.append(str(report).encode() + pb.MigrationList(migrations=[report]).SerializeToString())

    asyncio.run(scenario())
    for words in (["pki", "show", str(tmp_path / "pki")], ["pki", "renew", str(tmp_path / "tls" / "operator-o")]):
        assert run([*words, *(["--ca", str(tmp_path / "pki")] if "renew" in words else []), "--json", "-vv"]) == 0
    output = said.readouterr()
    shown.append((output.out + output.err).encode())
    everything = b"\n".join(shown)
    assert b"certificate read again" in everything or b"new certificate not used" in everything, "it was looked at"
    keys = secrets(tmp_path)
    assert len(keys) >= 6 and str(tmp_path / "pki" / "ca.key") in keys
    for path, parts in keys.items():
        assert not [part for part in parts if part in everything], path
    assert tokens and all(tokens)
    for token in tokens:
        assert (
            token not in everything
            and token.hex().encode() not in everything
            and repr(token).encode() not in everything
        )


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_in_the_log_shows_no_values(as_json: bool) -> None:
    program = (
        "import structlog; from migrator import logs\n"
        f"logs.configure('info', as_json={as_json})\n"
        "def breaks(key):\n    raise ValueError('it broke')\n"
        "try:\n    breaks('SEC' + 'RET')\nexcept ValueError:\n    structlog.get_logger().exception('broken')\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "it broke" in ran.stderr and "breaks" in ran.stderr and "SECRET" not in ran.stderr
