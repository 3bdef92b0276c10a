"""What all commands share: the options that every one of them takes, and the ways to the coordinator and the agent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.errors import PeerLost

if TYPE_CHECKING:
    from migrator.cli.following import Ways
    from migrator.cli.settings import CommandFile
    from migrator.security.settings import Tls

COORDINATOR = "127.0.0.1:7400"
AGENT_SOCKET = "/run/migrator/agent.sock"
FILE = "/etc/migrator/cli.toml"
CALL_TIMEOUT_S = 30.0

_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 200),
]


@dataclass
class Context:
    """Options as given before or behind the command."""

    coordinator_address: str = ""
    agent_socket: str = AGENT_SOCKET
    tls_folder: str = ""
    json: bool = False
    verbose: int = 0
    _stubs: dict[str, Any] = field(default_factory=dict)

    @property
    def coordinator(self) -> Any:
        """Stub of the coordinator; its errors come as errors of the project."""
        from migrator._pb.migrator_pb2_grpc import CoordinatorStub

        address = self._coordinator()
        return self._stub(address, CoordinatorStub, f"coordinator at {address}")

    def _coordinator(self) -> str:
        return self.coordinator_address or (self.file and self.file.coordinator) or COORDINATOR

    @cached_property
    def file(self) -> CommandFile | None:
        """The command's own file, if there is one. Raises ConfigInvalid."""
        path = Path(os.environ.get("MIGRATOR_CONFIG", FILE))
        if not path.exists():
            return None
        from migrator.cli.settings import read

        return read(path)

    def _channel(self, address: str) -> Any:
        import grpc

        if address.startswith("unix:") or not (tls := self._tls()):
            return grpc.insecure_channel(address, options=_OPTIONS)
        from migrator.security.transport import Transport

        return Transport(tls).to_coordinator_blocking(address, _OPTIONS)

    def _tls(self) -> Tls | None:
        if self.tls_folder:
            from migrator.security.settings import folder

            return folder(Path(self.tls_folder))
        return self.file.tls if self.file else None

    @property
    def agent(self) -> Any:
        """Stub of this host's agent."""
        from migrator._pb.migrator_pb2_grpc import AgentStub

        self._require_socket()
        return self._stub(f"unix:{self.agent_socket}", AgentStub, f"agent at {self.agent_socket}")

    def _require_socket(self) -> None:
        if not Path(self.agent_socket).exists():
            raise PeerLost(
                f"no agent socket at {self.agent_socket}", hint="is the agent running? --agent names its socket"
            )

    def ways(self, *, here: bool = False) -> Ways:
        """How streams of agents are reached; `here`: of this host's agent alone. Raises PeerLost, ConfigInvalid."""
        from migrator.cli.following import Ways
        from migrator.security.settings import Tls
        from migrator.security.transport import Transport

        if here:
            self._require_socket()
            return Ways(Transport(Tls()), socket=self.agent_socket)
        return Ways(Transport(self._tls() or Tls()), coordinator=self._coordinator())

    def _stub(self, address: str, kind: Any, target: str) -> Any:
        if address not in self._stubs:
            self._stubs[address] = _Calls(kind(self._channel(address)), target)
        return self._stubs[address]


class _Calls:
    """A stub whose calls raise errors of the project. Streams come as iterators that do the same."""

    def __init__(self, stub: Any, target: str) -> None:
        self._stub, self._target = stub, target

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)

        def call(request: Any, timeout: float | None = CALL_TIMEOUT_S) -> Any:
            with translated(self._target):
                answer = method(request, timeout=timeout)
            return self._stream(answer) if hasattr(answer, "__next__") else answer

        return call

    def _stream(self, answer: Any) -> Iterator[Any]:
        with translated(self._target):
            try:
                yield from answer
            finally:
                answer.cancel()


@contextmanager
def translated(target: str) -> Iterator[None]:
    """Errors of gRPC as errors of the project."""
    import grpc

    from migrator.coordinator.rpc import received

    try:
        yield
    except grpc.RpcError as error:
        raise received(error, target) from None


pass_context = click.make_pass_decorator(Context, ensure=True)


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def take(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value:
            setattr(ctx.ensure_object(Context), name, value)

    return take


def shared_options(*, top: bool) -> list[click.Parameter]:
    """Options that may stand before the command or behind it; behind it only --json is shown in the help."""
    hidden = not top
    return [
        click.Option(
            ["--coordinator"],
            metavar="ADDR",
            envvar="MIGRATOR_COORDINATOR" if top else None,
            show_envvar=True,
            help=f"Coordinator's host:port or unix:PATH. Default {COORDINATOR}.",
            callback=_set("coordinator_address"),
            expose_value=False,
            hidden=hidden,
        ),
        click.Option(
            ["--agent"],
            metavar="SOCKET",
            envvar="MIGRATOR_AGENT" if top else None,
            show_envvar=True,
            help=f"Unix socket of this host's agent. Default {AGENT_SOCKET}.",
            callback=_set("agent_socket"),
            expose_value=False,
            hidden=hidden,
        ),
        click.Option(
            ["--tls"],
            metavar="FOLDER",
            envvar="MIGRATOR_TLS" if top else None,
            show_envvar=True,
            help="Folder of ca.crt, tls.crt and tls.key, to be known to the coordinator by.",
            callback=_set("tls_folder"),
            expose_value=False,
            hidden=hidden,
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            help="Print data as JSON.",
            callback=_set("json"),
            expose_value=False,
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            help="Say more; twice: also where an internal error came from.",
            callback=_set("verbose"),
            expose_value=False,
            hidden=hidden,
        ),
    ]


class Command(click.Command):
    """A command that takes the shared options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        taken = {name for param in self.params for name in param.opts}
        self.params += [option for option in shared_options(top=False) if not taken & set(option.opts)]


class Group(click.Group):
    """A noun."""

    command_class = Command


def complete(kind: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Shell completion of the names of VMs, hosts or policies; nothing when the coordinator does not answer at once."""

    def names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        from migrator._pb import migrator_pb2 as pb

        try:
            stub = ctx.ensure_object(Context).coordinator
            if kind == "host":
                found = {host.name for host in stub.Hosts(pb.Empty(), timeout=0.5).hosts}
            elif kind == "policy":
                found = {policy.name for policy in stub.Show(pb.Empty(), timeout=0.5).policies}
            else:
                found = {port.name or port.vm for port in stub.Show(pb.Empty(), timeout=0.5).ports}
        except Exception:
            return []
        return sorted(name for name in found if name.startswith(incomplete))

    return names
