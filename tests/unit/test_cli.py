"""The operator's command against a real coordinator, in this process: what it prints and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from migrator._pb import migrator_pb2 as pb
from migrator.cli.main import COMMANDS, cli, run
from migrator.table import plain
from tests.unit.scripted import MAC, VM, Agent, Bench, source

DOCUMENT = f"""
networks:
  - {{name: blue, kind: uplink, vlan: 7}}
address_sets:
  - {{name: office, prefixes: [192.0.2.0/24]}}
policies:
  - name: web
    rules:
      - {{direction: to, protocol: tcp, ports: 443, remote: "@office", action: allow}}
ports:
  - {{vm: {VM}, name: shop, mac: {MAC}, network: blue, host: h1, device: "t{{mac6}}", policy: web}}
"""


class Served:
    """A coordinator in a thread of its own, for commands that call it as a process would."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.bench = Bench(folder)
        self.do(self.bench.begin())

    def do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.do(self.bench.kill())
        self.do(self._cancel_rest())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    async def _cancel_rest(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self.loop.shutdown_asyncgens()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    coordinator = Served(tmp_path)
    monkeypatch.setenv("MIGRATOR_COORDINATOR", f"127.0.0.1:{coordinator.bench.port}")
    monkeypatch.setenv("MIGRATOR_AGENT", str(tmp_path / "no-agent.sock"))
    yield coordinator
    coordinator.close()
    structlog.reset_defaults()


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(DOCUMENT)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Standard output of a command that ends with `code`; what it says on standard error is one line."""
    got = run(arguments)
    out, err = capsys.readouterr()
    assert got == code, err
    if code:
        assert err.startswith("migrator: ") and err.count("\n") == 1, err
    return out + err


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str):
    assert run(arguments) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("served")
def test_apply_show_and_remove(document: str, capsys) -> None:
    assert "network blue: added (dry run)" in said(capsys, "apply", "-f", document, "--dry-run")
    assert parsed(capsys, "network", "list", "--json") == []
    assert f"port {VM}/{MAC}: added" in said(capsys, "apply", "-f", document)
    assert "nothing to change" in said(capsys, "port", "apply", "-f", document)
    assert parsed(capsys, "network", "show", "blue", "--json")["ports"] == [f"{VM}/{MAC}"]
    assert parsed(capsys, "--json", "address-set", "show", "office")["policies"] == ["web"]
    assert "@office" in said(capsys, "acl", "show", "web")
    assert "in use by" in said(capsys, "network", "del", "blue", code=3)
    said(capsys, "port", "del", MAC)
    said(capsys, "network", "del", "blue")
    assert parsed(capsys, "port", "list", "--json") == parsed(capsys, "network", "list", "--json") == []


@pytest.mark.usefixtures("served")
def test_objects_are_made_one_by_one(capsys) -> None:
    said(capsys, "network", "add", "blue", "--kind", "overlay", "--vni", "9")
    said(capsys, "address-set", "add", "office", "192.0.2.0/24", "2001:db8::/32")
    rule = ("--direction", "to", "--protocol", "tcp", "--ports", "80", "--ports", "443", "--remote", "@office")
    said(capsys, "acl", "add", "web", *rule, "--action", "allow", "--priority", "7")
    said(capsys, "policy", "add", "web", "--direction", "from", "--action", "allow")
    port = ("--vm", VM, "--mac", MAC, "--network", "blue", "--host", "h1", "--device", "v{mac6}", "--policy", "web")
    extra = ("--timeout", "udp=5000", "--device-at", "h2=tap9", "--address", "192.0.2.9", "--no-antispoof")
    said(capsys, "port", "add", *port, *extra)
    (shown,) = parsed(capsys, "port", "list", "--json")
    assert (shown["timeouts_ms"], shown["devices"], shown["no_antispoof"]) == ({"udp": 5000}, {"h2": "tap9"}, True)
    rules = parsed(capsys, "acl", "show", "web", "--json")["rules"]
    assert [(r["id"], r["priority"], r["ports"]) for r in rules] == [(1, 7, ["80", "443"]), (2, 100, [])]
    said(capsys, "acl", "del", "web", "--rule", "1")
    assert [r["id"] for r in parsed(capsys, "acl", "show", "web", "--json")["rules"]] == [2]


@pytest.mark.usefixtures("served")
def test_a_learning_port_is_enforced(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "apply", "-f", document)
    said(capsys, "port", "enforce", "shop")
    port = ("--vm", VM, "--mac", MAC, "--network", "blue", "--device", "t{mac6}", "--policy", "web", "--name", "shop")
    said(capsys, "port", "add", *port, "--learning")
    assert "learning" in said(capsys, "port", "list")
    assert "changed" in said(capsys, "port", "enforce", "shop")
    assert "nothing to change" in said(capsys, "port", "enforce", f"{VM}/{MAC}")
    assert "enforcing" in said(capsys, "port", "list")
    assert not parsed(capsys, "port", "show", MAC, "--json")[0]["learning"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("network", "add", "x", "--kind", "overlay"), 3, "vni"),
        (("network", "show", "none"), 4, "`migrator network list`"),
        (("port", "add", "--vm", "x", "--mac", MAC, "--network", "b"), 3, "vm: expected a uuid"),
        (("port", "add", "--vm", VM, "--mac", MAC, "--network", "b", "--trunk", "7"), 3, "NAME=VALUE"),
        (("apply", "-f", "/nowhere/a.yaml"), 3, "/nowhere/a.yaml: No such file"),
        (("migrate", "nobody", "--to", "h2"), 35, "nobody"),
        (("migration", "show", "abc"), 35, "abc"),
        (("watch", "--from", "999"), 5, "revision 0"),
        (("conntrack", "list", "nobody"), 4, "nobody"),
        (("trace", "nobody"), 32, "--agent"),
        (("checkpoint", VM, "-o", "/nowhere/x"), 32, "--agent"),
        (("host", "remove", "h9"), 4, "h9"),
        (("frobnicate",), 2, "No such command"),
        (("migrate", "x"), 2, "--to"),
        (("inspect", "/nowhere"), 3, "/nowhere: No such file"),
        (("coordinator", "--config", "/nowhere/c.toml"), 3, "/nowhere/c.toml"),
        (("agent", "--config", "/nowhere/a.toml"), 3, "/nowhere/a.toml"),
    ],
)
@pytest.mark.usefixtures("served")
def test_every_error_is_one_line_with_its_code(capsys, arguments, code: int, says: str) -> None:
    assert says in said(capsys, *arguments, code=code)


def test_no_coordinator_is_said_with_its_address(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_COORDINATOR", "127.0.0.1:9")
    assert "127.0.0.1:9" in said(capsys, "host", "list", code=32)


@pytest.mark.usefixtures("served")
def test_wrong_document_names_the_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(DOCUMENT.replace("vlan: 7", "vlan: 5000"))
    assert f"{path}:3: networks[0] (blue) vlan" in said(capsys, "apply", "-f", str(path), code=3)


def agents(served: Served, word: str) -> tuple[Agent, Agent]:
    """h1 with the VM and h2; the destination ends each migration with `word`."""

    class Destination(Agent):
        def _take(self, message: pb.ToAgent) -> None:
            super()._take(message)
            if message.WhichOneof("message") == "prepare":
                asyncio.get_running_loop().create_task(self._open())

        async def _open(self) -> None:
            await a.hear("authorise")
            self.progress(word, a.migration, moved={"conntrack": 12345})

    a, b = source("h1"), Destination("h2")
    served.do(served.bench.attach(a, b))
    return a, b


@pytest.mark.parametrize(("word", "code", "outcome"), [("opened", 0, "complete"), ("degraded", 40, "degraded")])
def test_migrate_shows_the_report_and_its_outcome(
    served: Served, document: str, capsys, word: str, code: int, outcome: str
) -> None:
    said(capsys, "apply", "-f", document)
    agents(served, word)
    assert run(["migrate", "shop", "--to", "h2"]) == code
    out = capsys.readouterr().out
    assert "preparing: round 0, 0 entries" in out
    assert outcome in out and "12,345" in out
    (report,) = parsed(capsys, "migration", "list", "--json")
    assert (report["outcome"], report["moved"]) == (outcome, {"conntrack": 12345})
    assert run(["migration", "show", report["id"][:8]]) == 0
    assert report["id"] in capsys.readouterr().out
    shown = parsed(capsys, "vm", "show", "shop", "--json")
    assert (shown["host"], shown["migration"]["id"]) == ("h2", report["id"])


def test_refused_migration_has_its_code(served: Served, document: str, capsys) -> None:
    said(capsys, "apply", "-f", document)
    a, b = agents(served, "opened")
    b.refuse.add("prepare")
    b.on["abort"] = ["aborted"]
    assert run(["migrate", "shop", "--to", "h2", "--json"]) == 31
    report = json.loads(capsys.readouterr().out)
    assert report["outcome"] == "refused" and "prepare refused" in report["reason"]
    assert "start" not in a.names()


def test_detached_migration_is_aborted_by_hand(served: Served, document: str, capsys) -> None:
    said(capsys, "apply", "-f", document)
    a, b = agents(served, "opened")
    a.on, b.on = {"abort": ["rolled-back"]}, {"verdict": ["aborted"], "abort": ["aborted"]}
    migration = said(capsys, "migrate", VM, "--to", "h2", "--detach").strip()
    served.do(a.hear("start"))
    assert migration in said(capsys, "migration", "list", "--running")
    assert "aborted" in said(capsys, "migration", "abort", migration)
    assert migration not in said(capsys, "migration", "list", "--running")


@pytest.mark.usefixtures("served")
def test_watch_prints_the_snapshot_and_goes_on_from_a_revision(document: str, capsys) -> None:
    said(capsys, "apply", "-f", document)
    assert "place blue/52:54:00:12:34:56 is: at h1, epoch 1" in said(capsys, "watch", "--snapshot")
    assert run(["watch", "--from", "2", "--count", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["revision"], line["sort"]) for line in lines] == [(3, "policy"), (4, "port")]


def test_hosts_are_listed_and_forgotten(served: Served, capsys) -> None:
    agents(served, "opened")
    assert [host["name"] for host in parsed(capsys, "host", "list", "--json")] == ["h1", "h2"]
    assert "which is connected" in said(capsys, "host", "remove", "h2", code=3)


def test_snapshot_files_are_inspected_and_compared(capsys) -> None:
    golden = sorted((Path(__file__).parent.parent / "fixtures").glob("*.mgs"))
    assert parsed(capsys, "inspect", str(golden[0]), "--json")["records"] > 0
    assert run(["diff", str(golden[0]), str(golden[0])]) == 0
    assert capsys.readouterr().out == ""


def test_messages_print_with_numbers_as_numbers() -> None:
    report = pb.Migration(id="x", bytes=1 << 40, moved={"acl": 3}, warnings=["w"])
    body = plain(report)
    assert (body["bytes"], body["moved"], body["warnings"], body["done"]) == (1 << 40, {"acl": 3}, ["w"], False)
    assert "network" not in plain(pb.Change(sort="port", port=pb.Port(vm=VM)))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(capsys, shell: str) -> None:
    assert "_MIGRATOR_COMPLETE" in said(capsys, "completion", shell)


def test_names_of_vms_are_completed(served: Served, document: str, capsys) -> None:
    from migrator.cli.context import Context, complete

    said(capsys, "apply", "-f", document)
    command = cli.get_command(None, "migrate")
    ctx = command.make_context("migrate", [], resilient_parsing=True, obj=Context())
    ctx.obj.coordinator_address = f"127.0.0.1:{served.bench.port}"
    assert complete("vm")(ctx, command.params[0], "sh") == ["shop"]
    assert complete("policy")(ctx, command.params[0], "") == ["web"]


def test_fields_of_connections_are_completed() -> None:
    set_label = cli.get_command(None, "conntrack").get_command(None, "set-label")
    ctx = set_label.make_context("set-label", [], resilient_parsing=True)
    match = next(param for param in set_label.params if param.name == "matches")
    assert [item.value for item in match.shell_complete(ctx, "la")] == ["label=", "laddr="]
    assert [item.value for item in match.shell_complete(ctx, "mark")] == ["mark="]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(capsys, name: str) -> None:
    assert "Usage: migrator" in said(capsys, name, "--help")


def test_migration_in_doubt_is_not_waited_for(served: Served, document: str, capsys) -> None:
    said(capsys, "apply", "-f", document)
    agents(served, "committed")
    served.do(shorten(served.bench))
    assert run(["migrate", "shop", "--to", "h2"]) == 37
    out = capsys.readouterr().out
    assert "in-doubt" in out
    (report,) = parsed(capsys, "migration", "list", "--json")
    assert "is not with host h9" in said(capsys, "migration", "resolve", report["id"], "--guest-at", "h9", code=34)


async def shorten(bench: Bench) -> None:
    execution = bench.cluster.migrations._execution
    execution.deadlines = execution.deadlines.model_copy(update={"switchover_s": 0.2})
