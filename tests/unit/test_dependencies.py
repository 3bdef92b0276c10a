# SPDX-License-Identifier: GPL-2.0-only
"""docs/dependencies.md is what pyproject.toml asks for and the lock pins, under the licences that these state."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "dependencies.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
COMPATIBLE = {"MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Zlib", "PSF-2.0", "CC0-1.0", "ISC"}
COMPATIBLE |= {"GPL-2.0-or-later", "GPL-2.0-only", "LGPL-2.0-or-later", "LGPL-2.1-or-later"}
SPELLED = {
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "LGPL-v2.0-or-later": "LGPL-2.0-or-later",
    "Apache Software License": "Apache-2.0",
}


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~!;\[ ]", requirement)[0].lower().replace("_", "-")


def wanted(*extras: str) -> set[str]:
    lists = [PROJECT["optional-dependencies"][extra] for extra in extras] or [PROJECT["dependencies"]]
    return {name_of(one) for requirements in lists for one in requirements}


def chapter(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows() -> dict[str, list[str]]:
    """Package -> cells, of what is needed at run time."""
    lines = [line for line in chapter("At run time").splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row for row in cells}


def stated(package: str) -> str:
    """The licence that the installed package states, as an SPDX expression as far as it goes."""
    metadata = importlib.metadata.metadata(package)
    classifiers = [
        one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier") or [] if one.startswith("License")
    ]
    text = metadata.get("License-Expression") or (metadata.get("License") or "").strip() or " OR ".join(classifiers)
    return SPELLED.get(text, text)


def may_be_combined(expression: str) -> bool:
    """With GPL-2.0-only: all parts of an AND, one of an OR."""
    return all(
        any(part.strip("() ") in COMPATIBLE for part in clause.split(" OR ")) for clause in expression.split(" AND ")
    )


def in_turn() -> set[str]:
    (line,) = re.findall(r"^In turn: (.*)\.$", TEXT, re.MULTILINE)
    return set(line.split(", "))


def needed_by(packages: set[str]) -> set[str]:
    """What the lock says that these need, all the way, by its remarks `# via`."""
    users: dict[str, set[str]] = {}
    for entry in re.split(r"\n(?=[a-z])", LOCK):
        remarks = entry.partition("# via")[2]
        users[name_of(entry.partition("==")[0])] = {name_of(word) for word in re.findall(r"[\w.-]+", remarks)}
    found = set(packages)
    while more := {name for name, by in users.items() if by & found} - found:
        found |= more
    return found


def test_the_page_has_what_the_project_asks_for() -> None:
    assert set(rows()) == wanted()
    assert all(len(row) == 4 and all(row) for row in rows().values())


def test_the_page_has_what_that_needs_in_turn() -> None:
    assert in_turn() == needed_by(wanted()) - wanted()


def test_the_page_has_what_development_needs() -> None:
    text = chapter("For development")
    missing = [name for extra in PROJECT["optional-dependencies"] for name in wanted(extra) if name not in text]
    assert missing == []


def test_everything_is_pinned_with_hashes() -> None:
    entries = re.split(r"\n(?=[a-z])", LOCK)
    pinned = {name_of(entry.partition("==")[0]) for entry in entries}
    assert [entry.splitlines()[0] for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []
    assert wanted(*PROJECT["optional-dependencies"]) | wanted() <= pinned


@pytest.mark.parametrize("package", sorted(wanted()))
def test_the_page_tells_the_licence_that_the_package_states(package: str) -> None:
    told, said = rows()[package][3], stated(package)
    assert told == said or (told.endswith(" and others") and said.startswith(told.removesuffix(" and others")))


@pytest.mark.parametrize("package", sorted(wanted() | in_turn()))
def test_licences_may_be_combined_or_the_page_says_not(package: str) -> None:
    warned = re.findall(r"\*\*Apache-2\.0 alone: (.*?)\*\*", TEXT.replace("\n", " "))
    named = set(re.split(r", | and ", warned[0]))
    assert may_be_combined(stated(package)) is (package not in named), stated(package)
