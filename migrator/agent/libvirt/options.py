"""`[guests]` of the agent's configuration when its driver is "libvirt"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from migrator.agent.libvirt.memory import Aim
from migrator.errors import ConfigInvalid


class LibvirtOptions(BaseModel):
    """How libvirt is reached, how VMs are moved, and when they are stopped for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str = "qemu:///system"
    connect_s: float = Field(default=10.0, gt=0)  # the agent's start waits so long for libvirtd
    hook_socket: Path = Path("/run/migrator/hook.sock")  # of the hook and the lock driver
    begin_wait_s: float = Field(default=100.0, gt=0)  # the hook `migrate`: until the copy of the state has begun
    copy_wait_s: float = Field(default=30.0, ge=0)  # the hook `prepare`: for the first full copy, then it goes on
    migrate_uri: str = "qemu+tcp://{host}/system"  # by which libvirtd here reaches the one there
    data_uri: str = ""  # by which QEMU here reaches QEMU there: "tcp://{host}"; "": as libvirt finds it
    uris: dict[str, str] = {}  # host -> migrate_uri, where the pattern does not fit
    data_uris: dict[str, str] = {}
    tunnelled: bool = False  # memory through libvirtd's connection
    postcopy: bool = False  # may be turned to post-copy (virsh migrate-postcopy)
    bandwidth_mib_s: int = Field(default=0, ge=0)  # 0: as libvirt has it
    strict: bool = False  # a VM comes here with all of its state or not at all; its metadata may say otherwise
    lead: bool = True  # the agent stops the guest, not QEMU
    downtime_ms: int = Field(default=0, ge=0)  # wanted; 0: QEMU's limit (300)
    max_passes: int = Field(default=0, ge=0)  # over the memory, then it is stopped anyhow; 0: no limit
    max_downtime_ms: int | None = Field(default=None, ge=0)  # QEMU's limit in a move; 0: left alone; none: see docs

    @property
    def aim(self) -> Aim:
        return Aim(self.lead, self.downtime_ms, self.max_passes, self.max_downtime_ms)

    def uri_of(self, host: str) -> str:
        return self.uris.get(host) or self.migrate_uri.replace("{host}", host)

    def data_uri_of(self, host: str) -> str:
        return self.data_uris.get(host) or self.data_uri.replace("{host}", host)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LibvirtOptions:
        """Raises ConfigInvalid naming the key."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            problems = "; ".join(f"guests.{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
            raise ConfigInvalid(problems, hint="docs/operations.md lists the keys") from error
