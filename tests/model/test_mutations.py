"""Each rule taken away: the search finds what then goes wrong, and shows the way to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model.explore import CounterExample, explore
from tests.model.mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.timeout(900)  # seconds of CPU, but others may have most of it
PROTOCOL = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
RELIABILITY = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule.replace(" ", "-"))
def test_a_rule_that_is_taken_away_shows(mutation: Mutation, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CounterExample) as found:
        explore(mutation.model())
    shown = found.value
    with capsys.disabled():
        print(f"\n  without {mutation.rule} ({mutation.without}), {shown.states} states:")
        print("    " + " · ".join(shown.way))
        print(f"    → {shown.why}")


def rules() -> set[str]:
    """Names of all rules in docs/protocol.md."""
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+): ", PROTOCOL, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_rule_is_in_the_model_or_named_with_its_test() -> None:
    chapter = RELIABILITY.split("\n## Model\n")[1].split("\n## ")[0]
    explored = {mutation.rule for mutation in MUTATIONS} & rules()
    elsewhere = set(re.findall(r"^\| `(\w+)` \| ", chapter.split("### Rules held elsewhere")[1], re.MULTILINE))
    assert len(rules()) > 40
    assert rules() - explored == elsewhere


def test_the_documents_table_has_every_mutation() -> None:
    shown = RELIABILITY.replace("`", "")
    for mutation in MUTATIONS:
        assert f"| {mutation.rule} | {mutation.without} | {mutation.budget} |".replace("`", "") in shown
