"""One target under atheris, in a process of its own: python -m tests.fuzz.drive TARGET [LIBFUZZER OPTION ...]."""

from __future__ import annotations

import sys

import atheris
import structlog

_INSTRUMENTED = (
    "migrator",
    "datapath.state",
    "datapath.drivers.dummy",
    "yaml",
    "tomllib",
    "json",
    "migrator_qemu_hook",
)


def main() -> None:
    name = sys.argv[1]
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        from .targets import TARGETS

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # not a word
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
