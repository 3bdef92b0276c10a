# SPDX-License-Identifier: GPL-2.0-only
"""The vNIC process by itself: hosts are plain bridges, so that what is seen is its doing alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_vm
from migrator.lab.processes import Worker, wait_until
from migrator.lab.topology import Lab

NUMBERS = 9000


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two hosts whose taps are ports of a bridge with their uplink, and a peer in the control namespace."""
    with Lab(("h1", "h2")) as made:
        for host in made.host_names:
            netns.ip_batch(
                made.name(host),
                [
                    "link add br0 type bridge",
                    "link set br0 up",
                    "link set up0 master br0",
                ],
            )
        netns.ip("addr", "add", "10.1.1.1/16", "dev", "up0", namespace=made.name("control"))
        yield made


@pytest.fixture
def vm(lab: Lab) -> Machine:
    made = add_vm(lab, "vm", "h1", [Port("02:00:00:00:00:01", "", ("10.1.0.1",))])
    join(lab, "h1")
    return made


def join(lab: Lab, host: str) -> None:
    netns.ip("link", "set", f"vm.0{host}", "master", "br0", namespace=lab.name(host))


def stream(lab: Lab, vm: Machine, every_ms: float = 1) -> tuple[Worker, Worker]:
    """Numbers from the control namespace to the guest, arriving by now."""
    receiver = vm.worker("probe")
    receiver.call("receive", address="0.0.0.0", port=NUMBERS)
    sender = lab.worker("control", "probe")
    sender.call("send", flow=1, address=vm.address, port=NUMBERS, every_ms=every_ms)
    wait_until("numbers arrive", lambda: received(receiver) > 20)
    return sender, receiver


def received(receiver: Worker) -> int:
    return int(receiver.call("report")["flows"].get("1", {}).get("received", 0))


def test_frames_pass_both_ways_with_offloads(lab: Lab, vm: Machine) -> None:
    server, client = vm.worker("tcp"), lab.worker("control", "tcp")
    server.call("listen", address="0.0.0.0", port=7000)
    assert client.call("connect", address=vm.address, port=7000, count=20) == {"connected": 20, "failed": 0}
    checked = client.call("check", size=200_000)
    assert (checked["alive"], checked["lost"], checked["bytes"]) == (20, 0, 20 * 200_000)
    assert vm.order("status")["to_guest"] < 20 * 200_000 / 1500, "large sends did not pass unsegmented"


def test_a_stop_alone_loses_one_frame_and_keeps_another(lab: Lab, vm: Machine) -> None:
    sender, receiver = stream(lab, vm)
    vm.order("suspend")
    wait_until("a frame is kept", lambda: vm.order("status")["kept"] == 1)
    before = received(receiver)
    wait_until("frames wait in the tap", lambda: sender.call("report") is not None and tap_backlog(lab) > 10)
    assert received(receiver) == before, "a stopped guest received"
    vm.order("resume")
    sent = sender.call("stop", flow=1)["sent"]
    report = wait_until("the last number came", lambda: finished(receiver, sent))
    assert report["missing_count"] == 1 == vm.order("status")["swallowed"]
    assert report["doubled"] == report["overtaken"] == 0


def tap_backlog(lab: Lab) -> int:
    """Frames that the bridge has given to the tap and nobody has read: none leave while the guest stands."""
    output = netns.run(["ip", "-n", lab.name("h1"), "-s", "link", "show", "vm.0h1"]).splitlines()
    return int(output[5].split()[1])


def finished(receiver: Worker, sent: int) -> dict[str, int] | None:
    report: dict[str, int] = receiver.call("report")["flows"]["1"]
    return report if report["newest"] == sent - 1 else None


def test_a_move_without_help_loses_frames(lab: Lab, vm: Machine) -> None:
    """What breaks without a switch that knows: frames sent to the old place."""
    sender, receiver = stream(lab, vm)
    vm.order("behave", memory_ms=10, downtime_ms=50, self_stop_ms=30)
    vm.order("migrate", to="h2")
    join(lab, "h2")
    vm.wait_for_place("h2")
    mark = received(receiver)
    wait_until("numbers arrive at the new place", lambda: received(receiver) > mark + 50)
    sent = sender.call("stop", flow=1)["sent"]
    assert received(receiver) < sent - 20
    wait_until("the old tap is gone", lambda: "vm.0h1" not in netns.ip("-o", "link", namespace=lab.name("h1")))


def test_a_move_that_fails_late_ends_at_the_source(lab: Lab, vm: Machine) -> None:
    sender, receiver = stream(lab, vm)
    vm.order("behave", memory_ms=10, downtime_ms=1000, self_stop_ms=30, fail_after_ms=60, swallow=False)
    vm.order("migrate", to="h2")
    wait_until("the guest stands", lambda: not vm.order("status")["running"])
    vm.wait_for_place("h1")
    assert "vm.0h2" not in netns.ip("-o", "link", namespace=lab.name("h2"))
    sent = sender.call("stop", flow=1)["sent"]
    report = wait_until("the last number came", lambda: finished(receiver, sent))
    assert report["missing_count"] == report["doubled"] == 0


def test_the_agent_is_told_in_json_lines(lab: Lab, vm: Machine) -> None:
    import json
    import socket

    clients = {}
    for host in lab.host_names:
        clients[host] = socket.socket(socket.AF_UNIX)
        clients[host].settimeout(10)
        clients[host].connect(str(lab.directory / host / "guests" / f"{vm.uuid}.sock"))
    files = {host: client.makefile("rw") for host, client in clients.items()}
    try:
        hello = {host: json.loads(file.readline()) for host, file in files.items()}
        assert (hello["h1"]["state"], hello["h2"]["state"]) == ("running", "absent")
        assert hello["h1"]["nics"] == [{"mac": "02:00:00:00:00:01", "device": "vm.0h1"}]
        vm.order("behave", memory_ms=1, downtime_ms=5)
        for request in ({"id": 1, "op": "migrate", "to": "h2"}, {"id": 2, "op": "suspend"}):
            files["h1"].write(json.dumps(request) + "\n")
            files["h1"].flush()
        told = [json.loads(files["h1"].readline()) for _ in range(4)]
        assert [t.get("id", t.get("event")) for t in told] == [1, "paused", 2, "stopped"]
        resumed = json.loads(files["h2"].readline())
        assert (resumed["event"], resumed["reason"]) == ("resumed", "migrated")
        assert told[1]["time"] < resumed["time"] < told[3]["time"]
    finally:
        for closing in (*files.values(), *clients.values()):
            closing.close()
