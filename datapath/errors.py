"""What can go wrong in a switch, as one tree.

    Error
      DatapathError
        UnsupportedKind     the driver cannot hold this kind of state, or not this much of it
        PortNotFound        no such port instance here
        StaleEpoch          the call names an older instance of the port than the one here
        LoadRejected        records that cannot be loaded as they are; nothing of the call was applied
        NotReady            the port is not in the state that the call needs
        FeatureMissing      kernel, tool or right that the driver needs is not there
        KernelError         a system call failed: errno and what was asked

migrator.errors goes on from `Error`. Every error carries a `hint`: what the reader can do now.
"""

from __future__ import annotations

import errno as _errno


class Error(Exception):
    """Root of all errors of the project.

    `hint` is one sentence that says what the reader can do now, or "".
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class DatapathError(Error):
    """A switch could not do what was asked."""


class UnsupportedKind(DatapathError):
    """The driver cannot hold this kind of state, or not in this version or amount."""


class PortNotFound(DatapathError):
    """No port instance of that VM, MAC and epoch is here."""


class StaleEpoch(DatapathError):
    """The call names an older instance of the port than the one that is here; it was ignored."""


class LoadRejected(DatapathError):
    """Records cannot be loaded as they are. Nothing of the call was applied."""


class NotReady(DatapathError):
    """The port is not in the state that the call needs."""


class FeatureMissing(DatapathError):
    """The kernel, a tool or a right that the driver needs is missing; the hint says how to get it."""


class KernelError(DatapathError):
    """A system call failed.

    `errno` is the kernel's; the message names the call and its object.
    """

    def __init__(self, what: str, errno: int, *, hint: str = "") -> None:
        super().__init__(f"{what}: {_errno.errorcode.get(errno, errno)}", hint=hint)
        self.errno = errno
