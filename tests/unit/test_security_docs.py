# SPDX-License-Identifier: GPL-2.0-only
"""docs/security.md names tests for each of its claims: they are there, and no test of an attack has no claim."""

from __future__ import annotations

import re
from pathlib import Path

from .test_protocol_docs import ROOT, called

TEXT = (ROOT / "docs" / "security.md").read_text()
NAMED = re.compile(r"((?:unit|netns|bpf|contract|libvirt)/test_\w+): ((?:`\w+`(?:, )?)+)")


def claims() -> list[list[str]]:
    """Cells of each row in the chapters on attackers."""
    found = []
    for chapter in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        if chapter.startswith("As "):
            table = [line for line in chapter.splitlines() if line.startswith("|")]
            found += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]
    return found


def named(text: str) -> set[tuple[str, str]]:
    """(file, test) of each that is named."""
    return {(file, test) for file, names in NAMED.findall(text) for test in re.findall(r"`(\w+)`", names)}


def test_every_claim_says_can_or_cannot_and_names_its_test() -> None:
    assert len(claims()) > 40
    for row in claims():
        assert len(row) == 3, row
        assert re.match(r"can|only", row[1]), row
        assert named(row[2]), row


def test_every_test_that_is_named_is_there() -> None:
    for file, test in sorted(named(TEXT)):
        assert Path(ROOT, "tests", f"{file}.py").is_file(), file
        assert test in called(f"{file}.py"), f"{file}: {test}"


def test_every_test_of_an_attack_stands_behind_a_claim() -> None:
    told = named(TEXT)
    for path in sorted((ROOT / "tests").glob("*/test_security_*.py")):
        file = f"{path.parent.name}/{path.stem}"
        if file == "unit/test_security_docs":
            continue
        for test in called(f"{file}.py"):
            assert (file, test) in told or test.startswith(("the_", "other_")), f"{file}: {test} is in no row"
