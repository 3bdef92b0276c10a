# SPDX-License-Identifier: GPL-2.0-only
"""Mutual TLS on real gRPC over loopback: who gets in, who does not, what is said; and certificates that change."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from migrator._pb import migrator_pb2 as pb
from migrator._pb import migrator_pb2_grpc as rpc
from migrator.agent.link import Link
from migrator.coordinator.rpc import received
from migrator.errors import CertificateInvalid, PeerLost
from migrator.security import authority
from migrator.security.identity import Identity, Role
from migrator.security.settings import Tls, folder
from migrator.security.transport import Transport

from .certified import OPTIONS, TIMEOUT_S, Certified, certified, refusal

OPERATOR = Identity(Role.OPERATOR, "x")


def test_who_has_a_certificate_of_the_authority_gets_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with certified(tmp_path) as it:
            assert (await it.stub("operator").Show(pb.Empty(), timeout=TIMEOUT_S)).revision == 0

    asyncio.run(scenario())


def no_certificate(it: Certified) -> Any:
    credentials = grpc.ssl_channel_credentials((it.directory / "pki" / "ca.crt").read_bytes())
    name = ("grpc.ssl_target_name_override", "coordinator.migrator.internal")
    return grpc.aio.secure_channel(it.address, credentials, options=[*OPTIONS, name])


def plaintext(it: Certified) -> Any:
    return grpc.aio.insecure_channel(it.address, options=OPTIONS)


def unchecked(it: Certified, tls: Tls) -> Any:
    """With files that our own client would not use."""
    assert tls.certificate and tls.key
    ca = (it.directory / "pki" / "ca.crt").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, tls.key.read_bytes(), tls.certificate.read_bytes())
    name = ("grpc.ssl_target_name_override", "coordinator.migrator.internal")
    return grpc.aio.secure_channel(it.address, credentials, options=[*OPTIONS, name])


def expired(it: Certified) -> Any:
    begins = datetime.now(UTC) - timedelta(days=2)
    return unchecked(it, it.tls("operator", "late", begins=begins, lifetime=timedelta(days=1)))


def of_another_authority(it: Certified) -> Any:
    authority.create(it.directory / "other").issue(OPERATOR, it.directory / "others")
    return unchecked(it, folder(it.directory / "others"))


def a_server_only(it: Certified) -> Any:
    return unchecked(it, it.tls("coordinator", "ctl"))


@pytest.mark.parametrize(
    "connect", [no_certificate, plaintext, expired, of_another_authority, a_server_only], ids=lambda it: it.__name__
)
def test_who_has_none_is_refused_and_told_what_to_look_at(tmp_path: Path, connect: Callable[[Certified], Any]) -> None:
    async def scenario() -> None:
        async with certified(tmp_path) as it:
            async with connect(it) as channel:
                stub: Any = rpc.CoordinatorStub(channel)  # type: ignore[no-untyped-call]
                error = await refusal(stub.Show(pb.Empty(), timeout=TIMEOUT_S))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            said = received(error, "the coordinator")
            assert isinstance(said, PeerLost) and "our certificate is missing, expired" in said.hint

    asyncio.run(scenario())


def test_a_client_talks_to_nobody_but_the_coordinator(tmp_path: Path) -> None:
    """Any agent of the cluster has a certificate of the same authority, and could listen in the coordinator's place."""

    async def scenario() -> None:
        async with certified(tmp_path) as it:
            server = grpc.aio.server()
            rogue = Transport(it.tls("agent", "h9"))
            it.port = rogue.listen(server, "127.0.0.1:0")
            await server.start()
            error = await refusal(it.stub("operator").Show(pb.Empty(), timeout=TIMEOUT_S))
            assert "not of who should be there" in received(error, "it").hint
            await server.stop(0)

    asyncio.run(scenario())


def test_a_client_of_another_authority_does_not_trust_the_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with certified(tmp_path) as it:
            authority.create(tmp_path / "other").issue(OPERATOR, tmp_path / "others")
            stub: Any = rpc.CoordinatorStub(it.channel(folder(tmp_path / "others")))  # type: ignore[no-untyped-call]
            error = await refusal(stub.Show(pb.Empty(), timeout=TIMEOUT_S))
            assert "not from the authority in our [tls] ca" in received(error, "it").hint

    asyncio.run(scenario())


def test_tls_to_a_server_without_it_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with certified(tmp_path) as it:
            server = grpc.aio.server()
            it.port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            error = await refusal(it.stub("operator").Show(pb.Empty(), timeout=TIMEOUT_S))
            assert "it speaks no TLS" in received(error, "it").hint
            await server.stop(0)

    asyncio.run(scenario())


def test_a_server_of_another_host_is_not_the_agent_that_was_meant(tmp_path: Path) -> None:
    async def scenario() -> None:
        ca = authority.create(tmp_path / "pki")
        for host in ("h1", "h2", "h3"):
            ca.issue(Identity(Role.AGENT, host), tmp_path / host)
        ca.issue(Identity(Role.COORDINATOR, "h2"), tmp_path / "ctl")
        for place, means in (("h2", True), ("h3", False), ("ctl", False)):
            server = grpc.aio.server()
            port = Transport(folder(tmp_path / place)).listen(server, "127.0.0.1:0")
            await server.start()
            async with Transport(folder(tmp_path / "h1")).to_agent(f"127.0.0.1:{port}", "h2", OPTIONS) as channel:
                stub: Any = rpc.PeerStub(channel)  # type: ignore[no-untyped-call]
                error = await refusal(stub.Ask(pb.MoveQuery(), timeout=TIMEOUT_S))
                assert (error.code() is grpc.StatusCode.UNIMPLEMENTED) == means, place
            await server.stop(0)

    asyncio.run(scenario())


@pytest.mark.alone
def test_certificates_are_changed_under_a_stream_and_the_old_one_ends(tmp_path: Path) -> None:
    """Both ends get new certificates while changes go over a stream: none is lost, new connections are by the new ones,
    and the old ones are refused once their time is over."""

    async def scenario(directory: Path, short: timedelta) -> bool:
        async with certified(directory, lifetime=short) as it:
            tls = it.tls("operator", lifetime=short)
            client = Transport(tls)
            seen: list[int] = []
            ended: list[str] = []
            watching = asyncio.create_task(watch(client, it.address, seen, ended))
            before = client.material()
            old = shutil.copytree(directory / "operator-x", directory / "old")
            apply(it, 1)
            await until(lambda: 1 in seen or watching.done())
            if watching.done():
                return False  # so slow that it had ended already

            it.authority.renew(directory / "coordinator-ctl")
            it.authority.renew(directory / "operator-x")
            await until(lambda: client.material() is not before)
            for number in range(2, 30):
                apply(it, number)
            await until(lambda: 29 in seen)
            on_the_same = not ended

            deadline = time.monotonic() + 90
            while await welcome(unchecked(it, folder(old))):
                assert time.monotonic() < deadline, "the old certificate is never refused"
                await asyncio.sleep(0.1)
            assert await welcome(client.to_coordinator(it.address, OPTIONS)), (
                "the server has its new one, and so have we"
            )
            apply(it, 30)
            await until(lambda: 30 in seen)
            assert seen == sorted(set(seen)) and not watching.done()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            assert len(ended) == 1 and "migrator://operator/x: expired at" in ended[0], ended
            return on_the_same

    attempts(tmp_path, scenario)


def test_an_agent_attaches_again_with_its_new_certificate_when_the_old_one_ends(tmp_path: Path) -> None:
    async def scenario(directory: Path, lifetime: timedelta) -> bool:
        async with certified(directory) as it:
            transport = Transport(it.tls("agent", "h1", lifetime=lifetime), Role.AGENT, "h1")
            times: list[float] = []

            async def hello() -> pb.Hello:
                return pb.Hello(host="h1", version="1", driver="dummy")

            async def take(message: pb.ToAgent) -> None:
                assert message.WhichOneof("message")

            link = Link(it.address, hello, take, lambda: times.append(time.monotonic()), transport)
            running = asyncio.create_task(link.run())
            ended = time.monotonic() + lifetime.total_seconds()
            await until(lambda: bool(times) or time.monotonic() > ended)
            in_time = bool(times)
            it.authority.renew(directory / "agent-h1")
            await until(lambda: len(times) == 1 + in_time and link.connected, lifetime.total_seconds() + 60)
            session = it.cluster.roster.get("h1")
            assert session is not None and session.open
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return in_time

    attempts(tmp_path, scenario)


def attempts(tmp_path: Path, scenario: Callable[[Path, timedelta], Coroutine[Any, Any, bool]]) -> None:
    """With certificates that live longer each time, until the machine was quick enough to use the first one."""
    for seconds in (3, 15, 60):
        (directory := tmp_path / str(seconds)).mkdir()
        if asyncio.run(scenario(directory, timedelta(seconds=seconds))):
            return
    pytest.fail("not connected within a minute")


def apply(it: Certified, number: int) -> None:
    it.cluster.apply(
        pb.ApplyRequest(config=pb.Config(networks=[pb.Network(name=f"n{number}", kind="uplink", vlan=number)]))
    )


async def watch(client: Transport, address: str, seen: list[int], ended: list[str]) -> None:
    """One stream after the other, each from where the last one ended; none after one that was not let in."""
    revision = 0
    while True:
        async with client.to_coordinator(address, OPTIONS) as channel:
            stub: Any = rpc.CoordinatorStub(channel)  # type: ignore[no-untyped-call]
            try:
                async for change in stub.Watch(pb.WatchRequest(sorts=["network"], from_revision=revision)):
                    revision = max(revision, change.revision)
                    if change.name:
                        seen.append(int(change.name.removeprefix("n")))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    return
                ended.append(error.details() or "")


async def welcome(channel: Any) -> bool:
    async with channel:
        stub: Any = rpc.CoordinatorStub(channel)  # type: ignore[no-untyped-call]
        try:
            await stub.Show(pb.Empty(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # By the handshake; in the second in which it ends, by the guard.
            assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED}
            return False
        return True


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def test_files_that_do_not_fit_change_nothing_until_they_do(tmp_path: Path) -> None:
    ca = authority.create(tmp_path / "pki")
    ca.issue(OPERATOR, tmp_path / "out")
    ca.issue(OPERATOR, tmp_path / "next")
    transport = Transport(folder(tmp_path / "out"))
    first = transport.material()

    def looked(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            transport.material()

    with capture_logs() as logs:
        shutil.copy(tmp_path / "next" / "tls.crt", tmp_path / "out" / "tls.crt")  # and not yet its key
        looked(lambda: bool(logs))
        assert "not the key of" in logs[0]["error"] and transport.material() is first
        (tmp_path / "out" / "tls.key").unlink()
        looked(lambda: len(logs) > 1)
        assert "No such file" in logs[1]["error"] and transport.material() is first
        shutil.copy(tmp_path / "next" / "tls.key", tmp_path / "out" / "tls.key")
        looked(lambda: transport.material() is not first)
    assert "PRIVATE" not in str(logs) and len(logs) == 3, "each is said once"


def test_a_server_whose_files_are_gone_goes_on_with_what_it_has(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with certified(tmp_path) as it:
            tls = it.tls("operator")
            shutil.rmtree(tmp_path / "coordinator-ctl")
            assert await welcome(it.channel(tls))

    asyncio.run(scenario())


def test_a_list_of_another_authority_is_not_taken(tmp_path: Path) -> None:
    ca = authority.create(tmp_path / "pki")
    ca.issue(OPERATOR, tmp_path / "out")
    authority.create(tmp_path / "other")
    for listed, says in (
        ("other/revoked.crl", "signed by none"),
        ("no.crl", "No such file"),
        ("pki/ca.crt", "no list"),
    ):
        tls = folder(tmp_path / "out").model_copy(update={"revoked": tmp_path / listed})
        with pytest.raises(CertificateInvalid, match=rf"tls\.revoked: .*{says}"):
            Transport(tls)


def test_a_certificate_that_was_revoked_counts_no_more(tmp_path: Path) -> None:
    """From the next call on, over the connection that is there. The others go on."""

    async def scenario() -> None:
        async with certified(tmp_path, revoked=tmp_path / "pki" / "revoked.crl") as it:
            gone, stays = it.stub("operator", "gone"), it.stub("operator", "stays")
            for stub in (gone, stays):
                await stub.Show(pb.Empty(), timeout=TIMEOUT_S)
            it.authority.revoke(authority.stored(tmp_path / "operator-gone" / "tls.crt"))
            error = await refusal(gone.Show(pb.Empty(), timeout=TIMEOUT_S))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED and "was revoked" in (error.details() or "")
            await stays.Show(pb.Empty(), timeout=TIMEOUT_S)

    asyncio.run(scenario())
