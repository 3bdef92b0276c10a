"""What can go wrong in a migration, as one tree that goes on from datapath.errors, and what it is called elsewhere.

    datapath.errors.Error
      DatapathError ...         see datapath.errors
      ConfigInvalid             a configuration file or an option that cannot be used as it is
      ObjectNotFound            no network, address set, policy, port or host of that name
      JournalFailed             the coordinator cannot read or write its journal
      RevisionCompacted         changes after that revision are no longer kept
      AccessError               who calls may not
        CertificateInvalid      a certificate, key or authority cannot be used as it is
        Forbidden               the caller's role, or its host, may not do this
        ResourceExhausted       the caller asks for more than one caller may have; later it may
      SnapshotError             a snapshot cannot be written or read
        Corrupt                 bytes that no writer wrote: damaged, cut off or forged
        Incompatible            well formed, but this version cannot take it
      MigrationError            a migration could not do its next step
        PreflightFailed         the destination (or the source) refuses, each reason a sentence
        PeerLost                the other agent or the coordinator does not answer
        DeadlineExceeded        a step took longer than it may
        IllegalTransition       the call does not fit the state the migration is in
        MigrationNotFound       no such migration or VM
        AlreadyMigrating        the VM is already being moved
        InDoubt                 nobody can know where the guest runs: the operator has to say

`EXTERNAL` gives each its gRPC status name and its CLI exit code: what is not in it has its nearest parent's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datapath import errors as datapath
from datapath.errors import Error


class ConfigInvalid(Error):
    """A configuration file or an option cannot be used as it is; the message names the file and the key."""


class ObjectNotFound(Error):
    """No network, address set, policy, port or host of that name is known."""


class JournalFailed(Error):
    """The coordinator cannot read or write its journal; nothing was done."""


class RevisionCompacted(Error):
    """Changes after that revision are no longer kept: take a new snapshot."""


class AccessError(Error):
    """Who calls is not known, may not do this, or not as much of it."""


class CertificateInvalid(AccessError):
    """A certificate, its key or the authority cannot be used as it is; the message names the file or the caller."""


class Forbidden(AccessError):
    """The caller's role, or the host that its certificate names, may not do this; nothing was done."""


class ResourceExhausted(AccessError):
    """The caller asks for more than one caller may have; nothing was done, later it may be."""


class SnapshotError(Error):
    """A snapshot cannot be written or read.

    `section` counts from 0 within a stream, `field` names a column or field ("a.b" for nested ones), `offset` is the
    first byte of the object in its stream. None or "" where it does not apply.
    """

    section: int | None = None
    field: str = ""
    offset: int | None = None

    def __init__(
        self, message: str, *, hint: str = "", section: int | None = None, field: str = "", offset: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.section = section
        self.field = field
        self.offset = offset

    def __str__(self) -> str:
        at = [
            "" if self.section is None else f"section {self.section}",
            "" if self.offset is None else f"byte {self.offset}",
            f"field {self.field}" if self.field else "",
        ]
        where = ", ".join(part for part in at if part)
        return f"{where}: {super().__str__()}" if where else super().__str__()


class Corrupt(SnapshotError):
    """Bytes that no writer wrote: damaged, cut off or forged. Nothing of it was applied."""


class Incompatible(SnapshotError):
    """A well-formed snapshot that this version or this host cannot take. Nothing of it was applied."""


class MigrationError(Error):
    """A migration could not do its next step."""


class PreflightFailed(MigrationError):
    """A host refuses before anything moved. `reasons` are sentences, each naming the thing that is in the way."""

    def __init__(self, message: str, *, hint: str = "", reasons: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.reasons = tuple(reasons)

    def __str__(self) -> str:
        return "; ".join((super().__str__(), *self.reasons))


class PeerLost(MigrationError):
    """The other agent or the coordinator does not answer."""


class DeadlineExceeded(MigrationError):
    """A step took longer than it may."""


class IllegalTransition(MigrationError):
    """The call does not fit the state that the migration is in; nothing was done."""


class MigrationNotFound(MigrationError):
    """No migration or VM of that name is known here."""


class AlreadyMigrating(MigrationError):
    """The VM is already being moved: two migrations of one VM never run at once."""


class InDoubt(MigrationError):
    """Nobody can know where the guest runs; `migrator migration resolve` lets the operator say."""


EXTERNAL: Mapping[type[Error], tuple[str, int]] = {
    # class -> (gRPC status name, exit code of the CLI); 2 is click's usage error
    Error: ("INTERNAL", 1),
    ConfigInvalid: ("INVALID_ARGUMENT", 3),
    ObjectNotFound: ("NOT_FOUND", 4),
    JournalFailed: ("INTERNAL", 6),
    RevisionCompacted: ("OUT_OF_RANGE", 5),
    AccessError: ("PERMISSION_DENIED", 7),
    CertificateInvalid: ("UNAUTHENTICATED", 8),
    Forbidden: ("PERMISSION_DENIED", 9),
    ResourceExhausted: ("RESOURCE_EXHAUSTED", 18),
    datapath.DatapathError: ("INTERNAL", 10),
    datapath.UnsupportedKind: ("UNIMPLEMENTED", 11),
    datapath.PortNotFound: ("NOT_FOUND", 12),
    datapath.StaleEpoch: ("ABORTED", 13),
    datapath.LoadRejected: ("INVALID_ARGUMENT", 14),
    datapath.NotReady: ("FAILED_PRECONDITION", 15),
    datapath.FeatureMissing: ("FAILED_PRECONDITION", 16),
    datapath.KernelError: ("INTERNAL", 17),
    SnapshotError: ("INTERNAL", 20),
    Corrupt: ("DATA_LOSS", 21),
    Incompatible: ("FAILED_PRECONDITION", 22),
    MigrationError: ("INTERNAL", 30),
    PreflightFailed: ("FAILED_PRECONDITION", 31),
    PeerLost: ("UNAVAILABLE", 32),
    DeadlineExceeded: ("DEADLINE_EXCEEDED", 33),
    IllegalTransition: ("FAILED_PRECONDITION", 34),
    MigrationNotFound: ("NOT_FOUND", 35),
    AlreadyMigrating: ("ALREADY_EXISTS", 36),
    InDoubt: ("FAILED_PRECONDITION", 37),
}

OUTCOMES: Mapping[str, int] = {"complete": 0, "refused": 31, "in-doubt": 37, "degraded": 40, "aborted": 41}
"""Outcome of a migration -> exit code of the CLI."""

_BY_NAME = {kind.__name__: kind for kind in EXTERNAL}


def _external(kind: type[BaseException]) -> tuple[str, int]:
    return next((EXTERNAL[parent] for parent in kind.__mro__ if parent in EXTERNAL), EXTERNAL[Error])


def grpc_status(error: BaseException) -> str:
    """Name of the gRPC status code (of grpc.StatusCode) that stands for `error`; INTERNAL for what is not ours."""
    return _external(type(error))[0]


def exit_code(error: BaseException) -> int:
    """Exit code of the CLI for `error`; 1 for what is not ours."""
    return _external(type(error))[1]


def error_name(error: BaseException) -> str:
    """Name under which `error` travels: its nearest class in EXTERNAL."""
    return next((parent.__name__ for parent in type(error).__mro__ if parent in EXTERNAL), Error.__name__)


def rebuild(name: str, message: str, hint: str = "") -> Error:
    """The error that a peer raised, from its name, message and hint; an unknown name gives a plain MigrationError.

    Details beyond these (errno, section, reasons) are in the message and not rebuilt.
    """
    kind = _BY_NAME.get(name)
    if kind is None:
        return MigrationError(f"{name}: {message}" if name else message, hint=hint)
    if issubclass(kind, datapath.KernelError):
        kind = datapath.DatapathError
    return kind(message, hint=hint)
