# SPDX-License-Identifier: GPL-2.0-only
"""Every command that the README shows does what it says, in the order in which it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from datapath.registry import KINDS
from migrator.lab.cluster import Cluster
from migrator.lab.machines import Port, add_vm
from migrator.lab.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
VM = "3b0f6a52-6c3e-4d52-9a43-0f6f5a2b7c11"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    return [shlex.split(line[2:]) for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_make_demo_prints_its_result_as_its_last_line() -> None:
    assert ["make", "demo"] in commands()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not a sub-make
    command = ["make", "demo", "JSON=1"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["without_state"]["connections_lost"] > 0
    assert len(result["with_state"]) == 2
    for move in result["with_state"]:
        assert (move["connections_total"], move["connections_lost"]) == (1000, 0)
        assert (move["probes_lost"], move["frames_duplicated"]) == (0, 0)
        assert move["entries_moved"] >= 100_000
        assert move["switchover_ms"] > 0 < move["snapshot_bytes"]


def test_the_walk_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    shown = [words[1:] for words in commands() if words[0] == "migrator"]
    port = Port("02:00:5e:00:00:01", "blue", ("192.0.2.10", "2001:db8::10"), devices={"h1": "web0", "h2": "web0"})
    with Cluster(("h1", "h2")) as cluster:
        machine = add_vm(cluster, "web", "h1", [port], uuid=VM)
        for words in shown:
            host = "h2" if machine.place() == "h2" else "h1"
            ran = cluster.cli(*words, host=host)
            assert ran.returncode == 0, f"{shlex.join(words)}: {ran.stdout}{ran.stderr}"
            if words[0] == "apply":
                wait_until("the port is open", lambda: cluster.is_open(machine, "h1"))
        assert machine.place() == "h2"
        listed = json.loads(cluster.cli("migration", "list", "--json").stdout)
        assert [report["outcome"] for report in listed] == ["complete", "complete"]
        header = json.loads(cluster.cli("inspect", "web.mgs", "--json").stdout)
        named = set(json.dumps(header).replace('"', " ").split())
        assert named & KINDS.keys() == {name for name, kind in KINDS.items() if not kind.document and not kind.part_of}
        cluster.withdraw(machine)
    assert {"doctor", "apply", "migrate", "checkpoint"} <= {words[0] for words in shown}


def test_make_test_is_what_runs_this() -> None:
    assert ["make", "test"] in commands()
    assert "pytest" in (ROOT / "Makefile").read_text()
