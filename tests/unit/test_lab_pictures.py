"""What the demonstration prints and draws."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from migrator.lab import outcome, plot
from migrator.lab.demo import Move, Rates
from migrator.lab.workers import frames

RATES = Rates(101_000, 2e6, 7e5)


def move(**changes: object) -> Move:
    fields = {
        "source": "h1", "destination": "h2", "outcome": "complete", "connections_total": 1000, "connections_lost": 0,
        "bytes_verified": 1, "probes_sent": 300, "probes_lost": 0, "frames_duplicated": 0, "entries_moved": 101_000,
        "rounds": 3, "switchover_ms": 31.5, "snapshot_bytes": 2_500_000, "parts_ms": dict.fromkeys(outcome.PARTS, 1.0),
    }  # fmt: skip
    return Move(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_table_has_a_column_for_each_move() -> None:
    console = Console(record=True, width=120)
    outcome.show(console, move(connections_lost=1000), [move(), move(source="h2", destination="h1")], RATES)
    text = console.export_text()
    assert "1,000 of 1,000" in text
    assert "h2 → h1" in text


def test_convincing_is_everything_lost_without_and_nothing_with() -> None:
    lost = move(connections_lost=1000)
    assert outcome.convincing(lost, [move(), move()])
    assert not outcome.convincing(move(), [move()]), "a demonstration that loses nothing without state shows nothing"
    for failing in ({"connections_lost": 1}, {"probes_lost": 1}, {"frames_duplicated": 1}, {"outcome": "degraded"}):
        assert not outcome.convincing(lost, [move(), move(**failing)])


def test_the_picture_is_an_svg_with_a_panel_a_run(tmp_path: Path) -> None:
    panel = plot.Panel("with state", [0, 1, 2], [1000, 1000, 999], 1000, [0, 1], [1.0, 0.5], [(1.0, "moved to h2")])
    plot.write(tmp_path / "p.svg", [panel, panel])
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("moved to h2") == 2


def test_frames_by_hand_have_checksums_that_agree() -> None:
    segment = frames.tcp("10.0.0.1", "10.0.0.2", 1, 2, frames.SYN, 7)
    pseudo = frames.packed("10.0.0.1") + frames.packed("10.0.0.2") + bytes([0, 6]) + len(segment).to_bytes(2, "big")
    assert frames.checksum(pseudo + segment) == 0
    assert frames.checksum(frames.ip("10.0.0.1", "10.0.0.2", 17, b"")[:20]) == 0
