"""docs/protocol.md names files, rules and tests: they are there, and no rule's test is without its rule."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "protocol.md").read_text()
FOLDERS = {"agent": "migrator/agent", "coordinator": "migrator/coordinator", "lifecycle": "migrator/lifecycle"}
FOLDERS |= {"drivers": "datapath/drivers", "bpf": "datapath/bpf"}
CHAPTERS = ("Identity", "Where frames go", "Holding", "State", "Switchover and order of steps")
CHAPTERS += ("Who is right after a loss",)


def rows() -> list[list[str]]:
    """Cells of every rule: rows of the tables in the chapters that have rules, without their heads."""
    found = []
    for chapter in CHAPTERS:
        body = TEXT.split(f"\n## {chapter}\n")[1].split("\n## ")[0]
        table = [line for line in body.splitlines() if line.startswith("|")]
        found += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]
    return found


def names(row: list[str]) -> list[str]:
    """A rule's own names, from the beginning of its first cell; most have one."""
    own = re.match(r"(?:`\w+`(?:, )?)+(?=: )", row[0])
    assert own, f"a rule without a name: {row[0][:60]}"
    return re.findall(r"`(\w+)`", own[0])


def called(pattern: str = "*/test_*.py") -> list[str]:
    """Names of test functions, without `test_`."""
    files = (ROOT / "tests").glob(pattern)
    return [test for file in files for test in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)]


def test_every_rule_has_a_test_of_its_name_and_every_such_test_its_rule() -> None:
    rules = [name for row in rows() for name in names(row)]
    bound = [test.removeprefix("rule_") for test in called() if test.startswith("rule_")]
    assert len(rules) > 40
    assert len(rules) == len(set(rules)), "a name that two rules have"
    assert [rule for rule in rules if not any(test.startswith(rule) for test in bound)] == []
    assert [test for test in bound if not any(test.startswith(rule) for rule in rules)] == []


def test_every_rule_names_the_test_that_is_called_after_it() -> None:
    for row in rows():
        named = re.findall(r"`(\w+)…?`", row[-1])
        for rule in names(row):
            assert any(test.startswith(rule) for test in named), rule


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"((?:unit|netns|bpf|contract)/test_\w+)(?:\.py)?:\s((?:`\w+…?`(?:, )?)+)", TEXT)
    assert len(named) > 60
    for file, marked in named:
        there = [test.removeprefix("rule_") for test in called(f"{file}.py")]
        for name, more in re.findall(r"`(\w+)(…?)`", marked):
            assert any(test.startswith(name) if more else test == name for test in there), f"{file}: {name}"


def test_every_file_that_is_named_is_there() -> None:
    files = re.findall(r"`(\w+(?:/\w+)+\.(?:py|h|bpf\.c))`", TEXT) + re.findall(r"(\w+/test_\w+)", TEXT)
    assert len(files) > 60
    for file in files:
        folder, _, rest = file.partition("/")
        paths = [
            ROOT / file,
            ROOT / FOLDERS.get(folder, "") / rest,
            ROOT / "tests" / file,
            ROOT / "tests" / f"{file}.py",
        ]
        assert any(path.is_file() for path in paths), file
