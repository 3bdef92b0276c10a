"""docs/protocol.md names files and tests: they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "protocol.md").read_text()
FOLDERS = {"agent": "migrator/agent", "coordinator": "migrator/coordinator", "lifecycle": "migrator/lifecycle"}
FOLDERS |= {"drivers": "datapath/drivers", "bpf": "datapath/bpf"}


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"((?:unit|netns|bpf|contract)/test_\w+)(?:\.py)?:\s((?:`\w+…?`(?:, )?)+)", TEXT)
    assert len(named) > 60
    for file, names in named:
        tests = re.findall(r"^def test_(?:rule_)?(\w+)", (ROOT / "tests" / f"{file}.py").read_text(), re.MULTILINE)
        for name, more in re.findall(r"`(\w+)(…?)`", names):
            assert any(test.startswith(name) if more else test == name for test in tests), f"{file}: {name}"


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
