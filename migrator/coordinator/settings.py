"""The coordinator's own configuration: a TOML file with tables `[coordinator]`, replaced by options, and `[tls]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from migrator.documents import read_toml, validate
from migrator.errors import ConfigInvalid
from migrator.lifecycle.coordinator import Phase
from migrator.security.settings import Tls


class Deadlines(BaseModel):
    """Seconds that a phase may take. `pre_copy_s` holds for a migration whose order names no timeout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    describe_s: float = Field(default=10, gt=0)
    stage_s: float = Field(default=60, gt=0)
    start_s: float = Field(default=60, gt=0)
    pre_copy_s: float = Field(default=300, gt=0)
    switchover_s: float = Field(default=60, gt=0)
    settle_s: float = Field(default=120, gt=0)
    undo_s: float = Field(default=30, gt=0)
    return_s: float = Field(default=60, gt=0)  # for agents to come back after a restart of the coordinator

    def of(self, phase: Phase, timeout_s: float) -> float | None:
        """Deadline of a phase; None: it may last. The source keeps `timeout_s` itself, so it speaks first."""
        return {
            Phase.DESCRIBING: self.describe_s,
            Phase.STAGING: self.stage_s,
            Phase.STARTING: self.start_s,
            Phase.PRE_COPY: timeout_s + 10,
            Phase.AUTHORISED: timeout_s + 10 + self.switchover_s,
            Phase.SWITCHOVER: self.switchover_s,
            Phase.COMMITTED: self.switchover_s,
            Phase.OPEN: self.settle_s,
            Phase.ABORTING: self.undo_s,
        }.get(phase)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Address = Annotated[str, Field(pattern=r"^(unix:/.+|.+:\d{1,5})$")]


class Settings(BaseModel):
    """`listen`: host:port or unix:PATH, one or several, for agents and operators. `metrics_port` 0: none are served.

    `socket_group`: whose members may use the unix sockets, too, with `socket_role`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: Annotated[list[Address], BeforeValidator(_listed), Field(min_length=1)] = ["127.0.0.1:7400"]
    state_dir: Path = Path("/var/lib/migrator/coordinator")
    socket_group: str = ""
    socket_role: Literal["operator", "viewer"] = "viewer"
    metrics_port: int = Field(default=0, ge=0, le=65535)
    metrics_address: str = "127.0.0.1"
    log_json: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    deadlines: Deadlines = Deadlines()
    tls: Tls = Tls()

    @model_validator(mode="after")
    def _is_not_open_to_all(self) -> Settings:
        self.tls.require_for(self.listen, "listen")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    coordinator: dict[str, Any] = {}
    tls: Tls = Tls()


def load(path: Path | None, **options: Any) -> Settings:
    """Settings from a file (None: defaults) with the options that are not None in their place. Raises ConfigInvalid."""
    body: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigInvalid(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        body = read_toml(text, str(path))
        validate(_File, body, str(path))
    given = {name: value for name, value in options.items() if value is not None}
    tls = {"tls": body["tls"]} if "tls" in body else {}
    return validate(Settings, {**body.get("coordinator", {}), **tls, **given}, str(path or "options"))
