"""The ports of a host's VMs against what libvirt has: each thing said once, twice, late, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from datapath.errors import Error, PortNotFound
from migrator._pb import migrator_pb2 as pb
from migrator.agent.libvirt import inventory as module
from migrator.agent.libvirt.domain import Domain, parse
from migrator.agent.libvirt.inventory import Inventory
from migrator.agent.libvirt.saved import Saved
from migrator.errors import AlreadyMigrating, ConfigInvalid, Corrupt, PeerLost
from tests.unit.pair import eventually

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
MAC, SECOND = "52:54:00:00:00:10", "52:54:00:00:00:11"


def xml(*macs: str, device: str = "web{}", ours: bool = True, kind: str = "bridge") -> str:
    ports = "".join(f'<port mac="{mac}" network="blue"/>' for mac in macs)
    metadata = f'<metadata><ports xmlns="urn:vm-netstate-migrator:ports:1">{ports}</ports></metadata>' if ours else ""
    targets = [f"<target dev='{device.format(mac[-2:])}'/>" if device else "" for mac in macs]
    interfaces = "".join(
        f"<interface type='{kind}'><mac address='{mac}'/>{target}</interface>"
        for mac, target in zip(macs, targets, strict=True)
    )
    return f"<domain><name>shop</name><uuid>{VM}</uuid>{metadata}<devices>{interfaces}</devices></domain>"


class Host:
    """Libvirt and the agent of one host: what runs, and the ports that the switch has."""

    host = "h1"

    def __init__(self) -> None:
        self.live: dict[str, str] | None = {}
        self.managed_save = False
        self.ports: dict[str, pb.Port] = {}
        self.calls: list[str] = []
        self.failing: dict[str, Error] = {}
        self.coming = ""
        self.snapshot: set[str] | None = None

    # what libvirt says

    def running(self) -> list[str] | None:
        return None if self.live is None else list(self.live)

    async def xml(self, vm: str) -> str:
        return (self.live or {}).get(vm, "")

    async def kept(self, vm: str) -> bool:
        assert vm == VM
        return self.managed_save

    # what the agent does

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]

    async def declare(self, vm: str, ports: Sequence[pb.Port]) -> list[str]:
        assert all(port.vm == vm for port in ports)
        self._called("declare")
        known = self.ports
        self.ports = {port.mac: port for port in ports}
        for mac, port in self.ports.items():
            port.learning = port.learning or (mac in known and known[mac].learning)
        return []

    async def withdraw(self, vm: str) -> None:
        assert vm == VM
        self._called("withdraw")
        self.ports = {}

    def arriving(self, vm: str) -> str:
        assert vm == VM
        return self.coming

    async def statuses(self) -> AsyncIterator[pb.PortStatus]:
        for port in self.ports.values():
            instance = pb.Instance(vm=port.vm, mac=port.mac, state="active")
            yield pb.PortStatus(instance=instance, device=port.devices.get("h1", port.device))

    async def checkpoint(self, vm: str, path: Path) -> None:
        self._called("checkpoint")
        if not self.ports:
            raise PortNotFound(f"VM {vm} has no port")
        path.write_text(" ".join(sorted(self.ports)))

    async def restore(self, vm: str, path: Path) -> dict[str, int]:
        self._called("restore")
        if not self.ports:
            raise PortNotFound(f"VM {vm} has no port")
        self.snapshot = set(path.read_text().split())
        return {"conntrack": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "RETRY_S", 0.02)
    monkeypatch.setattr(module, "WORD_S", 0.05)
    yield


Test = Callable[[Host, Inventory], Awaitable[None]]


def scenario(folder: Path, test: Test, host: Host | None = None) -> Host:
    made = host or Host()

    async def run() -> None:
        inventory = Inventory(made, made, Saved(folder / "saved"))  # type: ignore[arg-type]
        await inventory.start()
        try:
            await test(made, inventory)
        finally:
            await inventory.stop()

    asyncio.run(run())
    return made


async def boot(host: Host, inventory: Inventory, *macs: str, hook: bool = True, device: str = "web{}") -> Domain:
    """A start, as hook and event tell of it."""
    domain = parse(xml(*macs, device=device))
    if hook:
        early = "" if device.startswith("vnet") else device
        await inventory.starting(parse(xml(*macs, device=early)))
        await inventory.restoring(domain)
    assert host.live is not None
    host.live[VM] = xml(*macs, device=device)
    inventory.hear(VM, "started", "booted")
    if hook:
        await inventory.started(domain)
    await eventually(lambda: set(host.ports) == set(macs))
    return domain


def end(host: Host, inventory: Inventory, how: str, detail: str) -> None:
    """The event, and what libvirt says from then on."""
    host.live = {}
    inventory.hear(VM, how, detail)


@pytest.mark.parametrize("hook", [True, False])
def test_a_start_declares_and_an_end_withdraws_however_often_it_is_said(tmp_path: Path, hook: bool) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        domain = await boot(host, inventory, MAC, SECOND, hook=hook)
        assert not any(port.learning for port in host.ports.values())
        inventory.hear(VM, "reset")
        end(host, inventory, "stopped", "destroyed")
        if hook:
            await inventory.stopped(domain)
            await inventory.stopped(domain)
        await eventually(lambda: not host.ports)
        assert "checkpoint" not in host.calls and host.calls.count("withdraw") == 1
        await boot(host, inventory, MAC, hook=hook)

    scenario(tmp_path, test)


def test_a_start_is_refused_with_the_coordinators_reason(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        host.failing["declare"] = ConfigInvalid("there is no network blue")
        with pytest.raises(ConfigInvalid, match="no network blue"):
            await inventory.starting(parse(xml(MAC)))

    scenario(tmp_path, test)


def test_a_start_without_a_coordinator_goes_on_and_is_declared_later(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        host.failing["declare"] = PeerLost("no coordinator")
        warnings = await inventory.starting(parse(xml(MAC)))
        assert "declared later" in warnings[0]
        await eventually(lambda: host.calls.count("declare") >= 1)
        assert "withdraw" not in host.calls, "a VM that is being started is no VM that ended"
        assert host.live is not None
        host.live[VM] = xml(MAC)
        inventory.hear(VM, "started", "booted")
        await eventually(lambda: host.calls.count("declare") > 3)
        del host.failing["declare"]
        await eventually(lambda: bool(host.ports))
        assert not host.ports[MAC].learning

    scenario(tmp_path, test)


def test_a_device_that_libvirt_names_is_declared_when_it_has_a_name(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        await boot(host, inventory, MAC, device="vnet{}")
        assert host.ports[MAC].devices == {"h1": "vnet10"}
        assert host.ports[MAC].device == "p{mac6}{vm8}"

    scenario(tmp_path, test)


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        domain = parse(xml(MAC))
        await inventory.starting(domain)
        assert host.ports
        await inventory.stopped(domain)
        assert not host.ports

    scenario(tmp_path, test)


def test_a_running_vm_is_adopted_and_learns(tmp_path: Path) -> None:
    host = Host()
    host.live = {VM: xml(MAC)}

    async def test(host: Host, inventory: Inventory) -> None:
        await eventually(lambda: bool(host.ports))
        assert host.ports[MAC].learning
        host.ports[MAC].learning = False  # the operator enforces
        inventory.hear("", "up")
        await eventually(lambda: host.calls.count("declare") == 2)
        assert not host.ports[MAC].learning

    scenario(tmp_path, test, host)


def test_hot_plug_does_not_learn_and_metadata_that_comes_later_does(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        await boot(host, inventory, MAC)
        assert host.live is not None
        host.live[VM] = xml(MAC, SECOND)
        inventory.hear(VM, "device-added", "net1")
        await eventually(lambda: len(host.ports) == 2)
        assert not host.ports[SECOND].learning
        host.live[VM] = xml(MAC)
        inventory.hear(VM, "device-removed", "net1")
        await eventually(lambda: list(host.ports) == [MAC])
        host.live[VM] = xml(MAC, SECOND)
        inventory.hear(VM, "metadata")
        await eventually(lambda: len(host.ports) == 2)
        assert host.ports[SECOND].learning and not host.ports[MAC].learning
        host.live[VM] = xml(MAC, SECOND, ours=False)
        inventory.hear(VM, "metadata")
        await eventually(lambda: not host.ports)

    scenario(tmp_path, test)


@pytest.mark.parametrize("first", ["hook", "event"])
def test_a_save_is_kept_once_and_comes_back(tmp_path: Path, first: str) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        domain = await boot(host, inventory, MAC)
        if first == "hook":
            ending = asyncio.create_task(inventory.stopped(domain))
            await asyncio.sleep(0)
            end(host, inventory, "saved", "saved")
            await ending
        else:
            end(host, inventory, "saved", "saved")
            await inventory.stopped(domain)
        await inventory.stopped(domain)
        await eventually(lambda: not host.ports)
        assert host.calls.count("checkpoint") == 1 and (tmp_path / "saved" / f"{VM}.mgs").exists()
        await inventory.coming_back(domain)
        await inventory.starting(domain)
        await inventory.restoring(domain)
        assert host.snapshot == {MAC} and not (tmp_path / "saved" / f"{VM}.mgs").exists()
        host.live = {VM: xml(MAC)}
        inventory.hear(VM, "restored", "saved")
        await inventory.started(domain)
        assert host.calls.count("restore") == 1

    scenario(tmp_path, test)


def test_the_hook_may_come_before_the_event(tmp_path: Path) -> None:
    """Of a restore libvirt tells when the guest goes on, after the hook."""

    async def test(host: Host, inventory: Inventory) -> None:
        domain = parse(xml(MAC))
        await inventory.starting(domain)
        await inventory.restoring(domain)
        await inventory.started(domain)
        inventory.hear("", "up")
        await asyncio.sleep(0.05)
        assert host.ports and "withdraw" not in host.calls

    scenario(tmp_path, test)


def test_without_a_hook_the_event_brings_it_back(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        await boot(host, inventory, MAC, hook=False)
        end(host, inventory, "saved", "saved")
        await eventually(lambda: not host.ports)
        host.live = {VM: xml(MAC)}
        inventory.hear(VM, "restored", "saved")
        await eventually(lambda: host.snapshot == {MAC})

    scenario(tmp_path, test)


def test_a_boot_or_an_undefine_forgets_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "saved" / f"{VM}.mgs"

    async def test(host: Host, inventory: Inventory) -> None:
        for forget in ("boot", "undefine"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(MAC)
            if forget == "boot":
                await boot(host, inventory, MAC)
            else:
                inventory.hear(VM, "undefined", "renamed")
                assert path.exists()
                inventory.hear(VM, "undefined", "removed")
            assert not path.exists()
        assert host.snapshot is None

    scenario(tmp_path, test)


def test_a_snapshot_that_cannot_be_used_costs_no_start(tmp_path: Path) -> None:
    path = tmp_path / "saved" / f"{VM}.mgs"

    async def test(host: Host, inventory: Inventory) -> None:
        path.parent.mkdir()
        path.write_text(MAC)
        domain = parse(xml(MAC))
        await inventory.coming_back(domain)
        await inventory.starting(domain)
        host.failing["restore"] = Corrupt("cut off")
        warnings = await inventory.restoring(domain)
        assert "starts without its connections" in warnings[0] and path.with_suffix(".unusable").exists()

    scenario(tmp_path, test)


def test_a_save_that_nobody_heard_of_is_kept_when_the_agent_is_back(tmp_path: Path) -> None:
    host = Host()
    host.ports = {MAC: pb.Port(vm=VM, mac=MAC)}
    host.managed_save = True

    async def test(host: Host, inventory: Inventory) -> None:
        del inventory
        await eventually(lambda: not host.ports)
        assert host.calls == ["checkpoint", "withdraw"]

    scenario(tmp_path, test, host)


def test_what_is_gone_when_libvirt_is_back_is_withdrawn(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        await boot(host, inventory, MAC)
        host.live = None
        inventory.hear(VM, "metadata")
        inventory.hear("", "up")
        await asyncio.sleep(0.05)
        assert host.ports, "libvirt is away: nobody knows"
        host.live = {}
        inventory.hear("", "up")
        await eventually(lambda: not host.ports)

    scenario(tmp_path, test)


def test_a_vm_on_its_way_here_is_left_alone_until_it_has_come(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        host.coming = "staged"
        assert host.live is not None
        host.live[VM] = xml(MAC)
        inventory.hear(VM, "started", "migrated")
        inventory.hear("", "up")
        await asyncio.sleep(0.05)
        assert "declare" not in host.calls
        host.coming = ""
        host.ports = {MAC: pb.Port(vm=VM, mac=MAC)}  # the migration opened it
        await eventually(lambda: "declare" in host.calls)
        assert not host.ports[MAC].learning

    scenario(tmp_path, test)


def test_a_vm_that_came_without_us_is_adopted_when_it_has_left_its_host(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        host.failing["declare"] = AlreadyMigrating("it runs at h2")
        assert host.live is not None
        host.live[VM] = xml(MAC)
        inventory.hear(VM, "started", "migrated")
        await eventually(lambda: host.calls.count("declare") > 2)
        del host.failing["declare"]
        await eventually(lambda: bool(host.ports))
        assert host.ports[MAC].learning

    scenario(tmp_path, test)


@pytest.mark.parametrize("came", ["migrated", "booted"])
def test_only_a_vm_that_came_running_from_a_host_without_us_learns(tmp_path: Path, came: str) -> None:
    """Told to come when nobody knew it, it is off or runs elsewhere without ports: its start says which."""

    async def test(host: Host, inventory: Inventory) -> None:
        domain = parse(xml(MAC))
        await inventory.starting(domain, unknown=True)
        await inventory.restoring(domain)
        assert host.ports and not host.ports[MAC].learning, "what cannot be declared refuses the move"
        assert host.live is not None
        host.live[VM] = xml(MAC)
        await inventory.started(domain)  # the hook may be quicker than the event
        assert not host.ports[MAC].learning
        before = len(host.calls)
        inventory.hear(VM, "started", came)
        await eventually(lambda: "declare" in host.calls[before:])
        assert host.ports[MAC].learning is (came == "migrated")
        host.ports[MAC].learning = False  # the operator enforces
        before = len(host.calls)
        inventory.hear(VM, "metadata")
        await eventually(lambda: "declare" in host.calls[before:])
        assert not host.ports[MAC].learning

    scenario(tmp_path, test)


def test_a_withdrawal_that_has_to_wait_for_a_move_is_made_after_it(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        await boot(host, inventory, MAC)
        host.failing["withdraw"] = AlreadyMigrating("it is being moved")
        end(host, inventory, "stopped", "migrated")
        await eventually(lambda: host.calls.count("withdraw") > 2)
        del host.failing["withdraw"]
        await eventually(lambda: not host.ports)

    scenario(tmp_path, test)


def test_a_refused_interface_of_a_running_vm_costs_the_others_nothing(tmp_path: Path) -> None:
    async def test(host: Host, inventory: Inventory) -> None:
        assert host.live is not None
        both = xml(MAC, SECOND)
        at = both.rindex("<interface type='bridge'>")
        host.live[VM] = both[:at] + both[at:].replace("bridge", "hostdev", 1)
        inventory.hear("", "up")
        await eventually(lambda: list(host.ports) == [MAC])

    scenario(tmp_path, test)
