"""`migrator migrate` with a hypervisor's options, its display and report, and `migrator host drain`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from grpc.aio import AioRpcError

from migrator._pb import migrator_pb2 as pb
from migrator.agent.guests.word import BY_DEFAULT, MoveOptions
from migrator.agent.orders import move_options
from migrator.cli.context import Context
from migrator.cli.drain import Plan, worst
from migrator.cli.main import run
from migrator.cli.progress import follow
from migrator.cli.report import downtime, memory_moved, memory_now
from migrator.coordinator.orders import body
from migrator.coordinator.running import Agreed, Running, decode, new_report
from migrator.errors import OUTCOMES, ObjectNotFound, PreflightFailed
from migrator.lifecycle import coordinator as machine
from tests.unit.scripted import MAC, VM, Agent, configuration, source
from tests.unit.test_cli import Served, parsed, served

__all__ = ["served"]  # the fixture
VMS = [f"6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a0{number}" for number in range(1, 6)]
MEMORY = {"total": 1 << 30, "remaining": 1 << 28, "passes": 2, "bps": 1 << 29}
DONE = {"total": 1 << 30, "transferred": 3 << 29, "passes": 2, "elapsed_ms": 1500, "downtime_ms": 31}


def attach(served: Served, *hosts: Agent) -> None:
    for agent in hosts:
        served.do(served.bench.attach(agent))


def applied(served: Served, count: int = 1) -> None:
    """VMs vm1, vm2, … on h1, one port each."""
    config = configuration()
    del config.ports[:]
    for number in range(count):
        mac = f"52:54:00:12:34:{number:02x}"
        port = pb.Port(vm=VMS[number], mac=mac, network="blue", host="h1", device="t{mac6}", name=f"vm{number + 1}")
        config.ports.append(port)

    async def apply() -> None:
        await served.bench.stub.Apply(pb.ApplyRequest(config=config))

    served.do(apply())


class Destination(Agent):
    """To which everything comes."""

    def come(self, migration: str) -> None:
        for word in ("committed", "opened"):
            self.progress(word, migration, moved={"conntrack": 7})


class Source(Agent):
    """h1: each VM comes to where it is sent as soon as that is authorised."""

    def __init__(self, *others: Destination) -> None:
        super().__init__("h1")
        self.on = source().on
        self._others = {other.host: other for other in others}
        self._to: dict[str, str] = {}

    def _take(self, message: pb.ToAgent) -> None:
        super()._take(message)
        if message.WhichOneof("message") == "start":
            self._to[message.start.migration] = message.start.destination
        if message.WhichOneof("message") == "authorise":
            migration = message.authorise.migration
            asyncio.get_running_loop().call_later(0.02, self._others[self._to[migration]].come, migration)


def cluster(served: Served, *others: Destination, vms: int = 1) -> Source:
    """h1 with VMs, and others."""
    h1 = Source(*others)
    attach(served, h1, *others)
    applied(served, vms)
    return h1


# ---- options ----


def test_options_of_the_hypervisor_reach_the_source(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    h1 = cluster(served, Destination("h2"))
    words = ["--bandwidth", "64", "--downtime", "40", "--postcopy", "--no-persistent", "--copy-storage", "inc"]
    words += ["--no-tunnelled", "--undefine", "--uri", "qemu+tcp://h2/system", "--data-uri", "tcp://192.0.2.2"]
    assert run(["migrate", "vm1", "--to", "h2", *words]) == 0
    order = h1.last("start")
    assert order.downtime_ms == 40
    assert move_options(order.move) == MoveOptions(
        64, True, "inc", False, True, "qemu+tcp://h2/system", "tcp://192.0.2.2", False
    )
    capsys.readouterr()


def test_what_is_not_given_is_left_to_the_host(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    h1 = cluster(served, Destination("h2"))
    assert run(["migrate", "vm1", "--to", "h2"]) == 0
    order = h1.last("start")
    assert (move_options(order.move), order.downtime_ms) == (BY_DEFAULT, 0)
    capsys.readouterr()


def test_the_options_outlive_the_coordinator() -> None:
    agreed = Agreed(VM, VM, "h1", "h2", 2, 1, "00", False, False, False, 1.0, 0, {"bandwidth_mib_s": "9"})
    run_ = Running(agreed, machine.begin(dry_run=False)[0], new_report(agreed))
    again = decode(run_.encode(), run_.report)
    assert body(machine.Order.START, again, None, "")["start"].move.bandwidth_mib_s == 9
    old = json.loads(run_.encode())
    del old["agreed"]["move"]  # as a coordinator before these options wrote it
    assert decode(json.dumps(old).encode(), run_.report).agreed.move == {}


def test_storage_is_copied_in_known_ways_only(served: Served) -> None:
    cluster(served, Destination("h2"))
    order = pb.MigrateRequest(vm=VMS[0], to="h2", move=pb.MoveOptions(copy_storage="some"))

    async def refused() -> str:
        try:
            async for _ in served.bench.stub.Migrate(order):
                return ""
        except AioRpcError as error:
            return str(error.details())
        return ""

    assert "storage cannot be copied as 'some'" in served.do(refused())


# ---- display and report ----


def test_memory_is_told_in_words() -> None:
    assert memory_now(pb.Migration()) == memory_moved(pb.Migration()) == ""
    assert memory_now(pb.Migration(memory=MEMORY)) == "memory 75% of 1.0 GiB, pass 2, 512.0 MiB/s"
    assert memory_moved(pb.Migration(memory=DONE)) == "1.5 GiB sent of 1.0 GiB in 2 passes, 1.5 s"


def test_downtime_is_the_hypervisors_and_ours() -> None:
    times = {"committed": 4.2, "open": 0.5, "downtime": 33.0}
    told = downtime(pb.Migration(memory=DONE, times_ms=times))
    assert told.startswith("31 ms, as the hypervisor says; 4.2 ms from its stop") and "; 0.5 ms from its start" in told
    assert downtime(pb.Migration(times_ms=times)).startswith("33.0 ms until the source knew it open; ")


def test_a_line_is_printed_for_each_phase_and_pass(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [
        pb.Migration(id="m", phase="pre-copy"),
        pb.Migration(id="m", phase="pre-copy", entries=5),
        pb.Migration(id="m", phase="authorised", memory=MEMORY),
        pb.Migration(id="m", phase="authorised", memory={**MEMORY, "passes": 3}),
        pb.Migration(id="m", phase="done", outcome="complete", done=True, memory=DONE, leading=True),
    ]
    assert follow(Context(), reports) == 0
    out = capsys.readouterr().out
    lines = out[: out.index("migration ")].splitlines()
    assert [line.split(":")[0] for line in lines] == ["pre-copy", "authorised", "authorised", "done"]
    assert lines[2].startswith("authorised: memory 75% of 1.0 GiB, pass 3")
    assert "downtime    31 ms, as the hypervisor says" in out and "stopped by  agent" in out


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Iterator[pb.Migration]:
        yield pb.Migration(id="abc", phase="pre-copy")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(Context(), interrupted())
    err = capsys.readouterr().err
    assert "`migrator migration show abc --follow`" in err and "`migrator migration abort abc`" in err


# ---- drain ----


def hosts(**ports: int) -> list[pb.Host]:
    return [pb.Host(name=name, connected=count >= 0, ports=max(count, 0)) for name, count in ports.items()]


def config(*names: str) -> pb.Config:
    ports = [pb.Port(vm=vm, mac=MAC, host="h1", name=vm) for vm in names]
    return pb.Config(ports=[*ports, pb.Port(vm="elsewhere", mac=MAC, host="h2")])


def test_each_vm_goes_where_the_fewest_ports_are() -> None:
    plan = Plan("h1", config("a", "b", "b", "c", "d"), hosts(h1=9, h2=2, h3=0, h4=-1))
    assert [(move.vm, move.ports) for move in plan.moves] == [("b", 2), ("a", 1), ("c", 1), ("d", 1)]
    assert [plan.choose(move) for move in plan.moves] == ["h3", "h2", "h3", "h2"]


def test_a_vm_that_was_refused_goes_to_the_next_host() -> None:
    plan = Plan("h1", config("a", "b"), hosts(h1=1, h2=0, h3=1))
    first, second = plan.moves
    assert plan.choose(first) == "h2"
    plan.failed(first)
    assert plan.choose(first, ["h2"]) == "h3"
    assert plan.choose(second) == "h2"
    assert plan.choose(first, ["h2", "h3"]) == ""


def test_a_drain_needs_somewhere_to_go() -> None:
    with pytest.raises(PreflightFailed, match="no other host"):
        Plan("h1", config("a"), hosts(h1=1, h2=-1))
    with pytest.raises(ObjectNotFound, match="h9"):
        Plan("h1", config("a"), hosts(h1=1, h2=0), to=["h9"])
    plan = Plan("h1", config("a"), hosts(h1=1, h2=0, h3=5), to=["h3"])
    assert plan.choose(plan.moves[0]) == "h3"


def test_the_worst_end_is_the_exit_code() -> None:
    assert worst([]) == worst([0, 0]) == 0
    assert worst([0, 40, 31]) == 31 and worst([41, 40]) == 41
    assert worst([41, OUTCOMES["in-doubt"]]) == 37 and worst([0, 32, 41]) == 32


def test_all_vms_leave_a_host(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(served, Destination("h2"), Destination("h3"), vms=4)
    assert run(["host", "drain", "h1", "--dry-run"]) == 0
    assert "waits" in capsys.readouterr().out
    moves = parsed(capsys, "host", "drain", "h1", "--except", "vm4", "--json")
    assert [(move["name"], move["state"], move["code"]) for move in moves] == [
        (f"vm{number}", "complete", 0) for number in (1, 2, 3)
    ]
    assert {move["to"] for move in moves} == {"h2", "h3"}
    assert {port["name"]: port["host"] == "h1" for port in parsed(capsys, "port", "list", "--json")} == {
        "vm1": False,
        "vm2": False,
        "vm3": False,
        "vm4": True,
    }


def test_no_more_move_at_once_than_wanted(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    under_way: list[int] = []
    going: set[str] = set()

    class Counting(Destination):
        def _take(self, message: pb.ToAgent) -> None:
            super()._take(message)
            if message.WhichOneof("message") == "prepare":
                going.add(message.prepare.migration)
                under_way.append(len(going))

        def come(self, migration: str) -> None:
            going.discard(migration)
            super().come(migration)

    cluster(served, Counting("h2"), vms=5)
    assert run(["host", "drain", "h1", "--at-once", "2"]) == 0
    assert max(under_way) == 2 and len(under_way) == 5
    out = capsys.readouterr().out
    assert "vm5: complete at h2" in out and out.count("complete") == 10


def test_one_that_does_not_go_keeps_no_other(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """h2 refuses all, h3 one of them."""
    h2, h3 = Destination("h2"), Picky("h3")
    h2.refuse = {"prepare"}
    h2.on = h3.on = {"abort": ["aborted"]}
    cluster(served, h2, h3, vms=3)
    assert run(["host", "drain", "h1", "--json"]) == 31
    moves = {move["name"]: move for move in json.loads(capsys.readouterr().out)}
    assert {name: (move["state"], move["to"]) for name, move in moves.items()} == {
        "vm1": ("complete", "h3"),
        "vm2": ("refused", ""),
        "vm3": ("complete", "h3"),
    }
    assert "h2: " in moves["vm2"]["reason"] and "h3: " in moves["vm2"]["reason"]


class Picky(Destination):
    """Refuses the second VM."""

    def _take(self, message: pb.ToAgent) -> None:
        picked = message.WhichOneof("message") == "prepare" and message.prepare.vm == VMS[1]
        self.refuse = {"prepare"} if picked else set()
        super()._take(message)
