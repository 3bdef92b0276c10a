"""docs/operations.md names each option of libvirt's driver, with its default, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from migrator.agent.libvirt.options import LibvirtOptions

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_every_option_is_in_the_table_and_no_other() -> None:
    table = TEXT[TEXT.index("| option of `[guests]` |") :]
    rows = re.findall(r"^\| (`[a-z].*?) \| (.*?) \|", table[: table.index("\n\n")], flags=re.M)
    described = {name for names, _ in rows for name in re.findall(r"`([a-z_]+)`", names)}
    assert described == set(LibvirtOptions.model_fields)
    numbers = {names.strip("`"): default for names, default in rows if default.isdigit()}
    for name, default in numbers.items():
        assert getattr(LibvirtOptions(), name) == float(default), name
    assert len(numbers) >= 4
