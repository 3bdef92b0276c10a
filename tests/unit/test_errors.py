"""One tree of errors, one table of what each is called elsewhere."""

from __future__ import annotations

import errno

import grpc
import pytest

from datapath import errors as datapath
from datapath.errors import Error
from migrator import errors
from migrator.errors import EXTERNAL, error_name, exit_code, grpc_status, rebuild


def _declared() -> set[type[Error]]:
    found: set[type[Error]] = {Error}
    for module in (datapath, errors):
        found |= {c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Error)}
    return found


def test_every_error_is_in_the_table_and_in_a_docstring() -> None:
    assert set(EXTERNAL) == _declared()
    text = (datapath.__doc__ or "") + (errors.__doc__ or "")
    assert [kind.__name__ for kind in EXTERNAL if kind.__name__ not in text] == []


def test_status_names_are_grpcs_and_exit_codes_tell_errors_apart() -> None:
    assert all(hasattr(grpc.StatusCode, status) for status, _ in EXTERNAL.values())
    codes = [code for _, code in EXTERNAL.values()]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 64 and code != 2 for code in codes)  # 2 is click's, 64 and up are shells' and sysexits'


def test_what_is_not_in_the_table_has_its_parents() -> None:
    class Special(errors.Corrupt):
        """A test's own."""

    assert (grpc_status(Special("x")), exit_code(Special("x"))) == ("DATA_LOSS", 21)
    assert error_name(Special("x")) == "Corrupt"
    assert (grpc_status(ValueError()), exit_code(ValueError())) == ("INTERNAL", 1)


@pytest.mark.parametrize("kind", EXTERNAL, ids=lambda kind: kind.__name__)
def test_errors_travel(kind: type[Error]) -> None:
    made = kind("it broke", errno.ENOMEM) if kind is datapath.KernelError else kind("it broke", hint="mend it")  # type: ignore
    again = rebuild(error_name(made), made.message, made.hint)
    assert isinstance(again, datapath.DatapathError if kind is datapath.KernelError else kind)
    assert (again.message, again.hint) == (made.message, made.hint)


def test_an_unknown_name_is_a_migration_error() -> None:
    again = rebuild("NewerError", "it broke", "upgrade")
    assert type(again) is errors.MigrationError
    assert "NewerError" in str(again) and "upgrade" in str(again)


def test_snapshot_errors_say_where() -> None:
    error = errors.Corrupt("has to be int", section=3, offset=70_000, field="count", hint="copy it again")
    assert str(error) == "section 3, byte 70000, field count: has to be int (copy it again)"
    assert str(errors.Corrupt("is empty", offset=0)) == "byte 0: is empty"
    assert "no network" in str(errors.PreflightFailed("refused", reasons=["no network blue", "no room"]))
