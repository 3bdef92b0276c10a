# SPDX-License-Identifier: GPL-2.0-only
"""A VM under traffic is watched while it moves and comes back: what is told is what its guests really did."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from migrator.lab.processes import wait_until

from .traffic import Conversations
from .world import SERVICE, World

SHORT_MS = 6_000  # connections that are closed leave the table within a test, and are seen by a host that is busy
NEWCOMERS_PER_S = 60


class Watch:
    """A `migrator watch` that runs, and the lines that it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process, self._output = process, output

    def lines(self) -> list[Any]:
        text = self._output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def said(self) -> str:
        return self._output.with_name(self._output.name + ".err").read_text()

    def ops(self, kind: str, *ops: str) -> list[Any]:
        return [line for line in self.lines() if line["kind"] == kind and line["op"] in ops]

    def current(self) -> bool:
        assert self._process.poll() is None, self.said()
        return any(line["op"] == "current" for line in self.lines())

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@contextmanager
def watching(world: World, output: Path, *arguments: str, host: str = "") -> Iterator[Watch]:
    process = world.cluster.cli_process("watch", "--json", *arguments, output=output, host=host)
    watch = Watch(process, output)
    try:
        yield watch
    finally:
        process.kill()
        process.wait()


def test_what_is_told_is_what_the_guests_did(world: World, tmp_path: Path) -> None:
    """Connections begin and end all along, with others that last; two moves, one watch, each thing once."""
    closing = ("tcp_time_wait", "tcp_close", "tcp_fin_wait", "tcp_last_ack", "tcp_close_wait")
    vm, peer = world.vm("h1", timeouts_ms=dict.fromkeys(closing, SHORT_MS)), world.peer("h3")
    lasting = Conversations.begin(vm, peer, inbound=20, outbound=20, every_ms=100)
    newcomers, arrivals = peer.worker("newcomers"), tmp_path / "arrivals"
    record = f'printf "%s %s %s\\n" "$MIGRATOR_OP" "$MIGRATOR_HOST" "$(wc -l)" >> {arrivals}'
    with ExitStack() as stack:
        whole = stack.enter_context(
            watching(world, tmp_path / "whole", "--kind", "conntrack", "--kind", "port", "--vm", vm.uuid)
        )
        arrived = ("--kind", "port", "--vm", vm.name, "--op", "arrived", "--shell", "--exec", record)
        stack.enter_context(watching(world, tmp_path / "arrived", *arrived))
        wait_until("the watch is current", whole.current, 30.0, explain=whole.said)
        known = {line["record"]["id"] for line in whole.ops("conntrack", "added")}
        newcomers.call("begin", address=vm.address, port=SERVICE, per_s=NEWCOMERS_PER_S)
        wait_until("newcomers come", lambda: newcomers.call("status")["done"] >= NEWCOMERS_PER_S)
        for to in ("h2", "h1"):
            world.move(vm, to)
            goal = newcomers.call("status")["done"] + NEWCOMERS_PER_S
            wait_until("newcomers come", lambda goal=goal: newcomers.call("status")["done"] >= goal)
        come = newcomers.call("finish", limit_s=15.0)
        assert not come["failed"]
        truth = Counter(come["ports"])
        wait_until(
            "all that was closed is told as removed",
            lambda: len(whole.ops("conntrack", "removed")) >= sum(truth.values()),
            60.0,
            0.5,
            lambda: f"{len(whole.ops('conntrack', 'removed'))} of {sum(truth.values())}: {whole.said()}",
        )
        lines = whole.ops("conntrack", "added", "removed")
        for op in ("added", "removed"):
            told = [line["record"] for line in lines if line["op"] == op and line["record"]["id"] not in known]
            assert Counter(one["rport"] for one in told) == truth, op
            assert len({one["id"] for one in told}) == len(told)
        assert len(known) == lasting.total
        assert not [line for line in lines if line["op"] == "removed" and line["record"]["id"] in known]
        assert [line["host"] for line in whole.ops("port", "arrived")] == ["h1", "h2", "h1"]
        assert not whole.ops("", "lost") and not whole.said()
        wait_until("the command has run", lambda: arrivals.exists() and arrivals.read_text().count("\n") >= 2)
        assert arrivals.read_text() == "arrived h2 1\narrived h1 1\n"
    lasting.assert_whole()


def test_an_agent_that_is_replaced_leaves_no_gap(world: World, tmp_path: Path) -> None:
    """The agent dies while connections begin; who watches hears that it was away, and then of every one of them."""
    vm, peer = world.vm("h1"), world.peer("h3")
    vm.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
    client = peer.worker("tcp")
    matches = ("--kind", "conntrack", "--vm", vm.name, "--match", f"lport={SERVICE}", "--match", "flags=INBOUND")
    with watching(world, tmp_path / "whole", *matches, "--interval", "0.2") as watch:
        wait_until("the watch is current", watch.current, 30.0, explain=watch.said)
        agent = world.cluster.agents["h1"]
        agent.kill()
        assert client.call("connect", address=vm.address, port=SERVICE, count=30)["failed"] == 0
        world.cluster.restart(agent)
        wait_until("all are told", lambda: len(watch.ops("conntrack", "added")) >= 30, 30.0, explain=watch.said)
        told = [line["record"]["id"] for line in watch.ops("conntrack", "added")]
        assert len(told) == len(set(told)) == 30 and not watch.ops("conntrack", "removed")
        assert [line["host"] for line in watch.ops("", "lost")] == ["h1"]
        assert "trying again" in watch.said() and "h1 answers" in watch.said()
