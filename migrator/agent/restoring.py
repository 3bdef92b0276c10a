"""Restore of a snapshot on this host, also where the VM's ports are already: they are replaced, but stay configured as
they are: a rule that was withdrawn since the snapshot was written does not come back with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datapath.provider import Driver, PortRef, PortState, PortStatus
from datapath.registry import KINDS
from datapath.state.kind import Nature, Op, Table
from datapath.state.port import PORT
from migrator._pb import migrator_pb2 as pb
from migrator.checkpoint import Configured, Restored, restore
from migrator.errors import PreflightFailed
from migrator.snapshot import SnapshotReader


@dataclass
class Replacement:
    """A checked snapshot, and what is here of its VM. `carry_out` runs in the VM's lane."""

    driver: Driver
    path: Path
    vm: str
    present: list[PortStatus] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)
    epoch: int = 1

    def carry_out(self, devices: Mapping[str, str], epoch: int) -> Restored:
        """Raises what migrator.checkpoint.restore does; the ports that were here are there again then, without state.

        `devices` go before those that are known; `epoch` 0 takes that of the ports that are here, or were declared.
        """
        moving = [status.ref.mac for status in self.present if status.state is not PortState.ACTIVE]
        if moving:
            raise PreflightFailed(f"port {moving[0]} of VM {self.vm} is not active", hint="end what is under way first")
        kept = [(status, self._configuration(status.ref)) for status in self.present]
        for status in self.present:
            self.driver.purge(status.ref)
        try:
            return restore(
                self.driver,
                lambda: self.path.open("rb"),
                epoch or self.epoch,
                {**self.devices, **devices},
                configured={status.ref.mac: _configured(status, tables) for status, tables in kept},
            )
        except BaseException:  # whatever it was: the VM is to have its ports
            for status, tables in kept:
                self._make_again(status, tables)
            raise

    def _configuration(self, ref: PortRef) -> list[Table]:
        """What was declared for a port beside its record."""
        held = self.driver.kinds()
        kinds = [k for k in KINDS.values() if Nature.CONFIGURATION in k.nature and k.name in held and k != PORT]
        return [table for kind in kinds for table in self.driver.dump(ref, kind.name)]

    def _make_again(self, status: PortStatus, tables: list[Table]) -> None:
        self.driver.stage(status.ref, status.record, status.device)
        for table in tables:
            self.driver.load(status.ref, table)
        self.driver.open(status.ref)


def _configured(status: PortStatus, tables: list[Table]) -> Configured:
    """As it is declared now, without what has been counted under it: that is the snapshot's."""
    record = dict(status.record)
    rules = [table for table in tables if table.op is not Op.ACCOUNT]
    return Configured(record, [Table(PORT.name, Op.LOAD, records=[record]), *rules])


def replace(driver: Driver, path: Path, sync: pb.Sync) -> Replacement:
    """Check a snapshot to its end and find what is here of its VM. Raises SnapshotError; nothing is changed."""
    with path.open("rb") as stream:
        reader = SnapshotReader(stream)
        for _ in reader:
            pass
    vm = reader.header.vm
    declared = [order for order in sync.ports if order.port.vm == vm]
    present = [status for status in driver.ports(vm) if status.state is not PortState.STUB]
    devices = {order.port.mac: order.device for order in declared}
    devices |= {status.ref.mac: status.device for status in present if status.device}
    epochs = [status.ref.epoch for status in present] or [order.epoch for order in declared] or [1]
    return Replacement(driver, path, vm, present, devices, max(epochs))
