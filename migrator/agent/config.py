"""The agent's configuration file: TOML, checked before anything is touched."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from migrator.errors import ConfigInvalid
from migrator.security.settings import Tls


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AgentSection(_Section):
    """`[agent]`: who this host is and where it listens."""

    host: str = Field(min_length=1, max_length=64)
    coordinator: str = "127.0.0.1:7400"
    listen: str = "0.0.0.0:7401"  # for other agents
    advertise: str = ""  # host:port at which other agents reach `listen`; "": what `listen` says
    socket: Path = Path("/run/migrator/agent.sock")
    socket_group: str = ""  # its members may use the socket, too, as what `socket_role` says
    socket_role: Literal["operator", "viewer"] = "viewer"
    state_dir: Path = Path("/var/lib/migrator/agent")
    metrics_port: int = Field(default=0, ge=0, le=65535)  # of Prometheus on 127.0.0.1; 0: none
    log_json: bool = True
    log_level: str = "info"


class NamedSection(BaseModel):
    """`[driver]` and `[guests]`: which one, and its own options beside it (or in a table `options`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    options: dict[str, Any] = {}

    @property
    def all_options(self) -> dict[str, Any]:
        return {**self.options, **(self.model_extra or {})}


class DriverSection(NamedSection):
    name: str = "ebpf"


class GuestsSection(NamedSection):
    driver: str = "none"


class MigrationSection(_Section):
    """`[migration]`: when a copy has converged, and how long anything may take. Times are in seconds."""

    small_round: int = Field(default=512, ge=0)  # records: a round of at most that many is small
    steady_round: int = Field(default=16_384, ge=0)  # so is one of at most that many when rounds shrink no more
    drain_interval_s: float = Field(default=0.02, gt=0)
    idle_s: float = Field(default=0.002, ge=0)  # the guest's queue has to be empty for so long before it is stopped
    idle_deadline_s: float = Field(default=0.1, ge=0)
    idle_blind_s: float = Field(default=0.02, ge=0)  # what a guest is given whose queue cannot be looked at
    probe_s: float = Field(default=3.0, gt=0)
    connect_s: float = Field(default=5.0, gt=0)
    step_s: float = Field(default=10.0, gt=0)  # a phase of the switchover
    last_changes_s: float = Field(default=1.0, gt=0)  # the guest runs at the destination before its state is there
    staged_s: float = Field(default=60.0, gt=0)  # a prepared destination waits for the source
    settle_s: float = Field(default=60.0, gt=0)
    timeout_s: float = Field(default=300.0, gt=0)  # until the switchover
    lease_s: float = Field(default=10.0, gt=0)
    redirect_idle_s: float = Field(default=60.0, ge=0)


class AgentConfig(_Section):
    """The whole file."""

    agent: AgentSection
    driver: DriverSection = DriverSection()
    guests: GuestsSection = GuestsSection()
    migration: MigrationSection = MigrationSection()
    tls: Tls = Tls()

    @model_validator(mode="after")
    def _is_not_open_to_all(self) -> AgentConfig:
        self.tls.require_for([self.agent.listen], "agent.listen")
        self.tls.require_for([self.agent.coordinator], "agent.coordinator")
        return self


def read_config(path: Path) -> AgentConfig:
    """The configuration in `path`. Raises ConfigInvalid naming the file and the key."""
    try:
        return AgentConfig.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ConfigInvalid(f"{path}: {error.strerror}", hint="give the agent's file with --config") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ConfigInvalid(f"{path}: {problems}", hint="docs/operations.md lists the keys") from error
    except RecursionError as error:
        raise ConfigInvalid(f"{path}: lists and tables are nested too deeply") from error
    except ValueError as error:  # a TOMLDecodeError, no UTF-8, or a number of thousands of digits
        raise ConfigInvalid(f"{path}: {error}", hint="the file has to be TOML") from error
