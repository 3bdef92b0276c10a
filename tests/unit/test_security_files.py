# SPDX-License-Identifier: GPL-2.0-only
"""Root writes and reads files in directories of others: a checkpoint that somebody asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from migrator.cli.snapshot import _write


def test_a_checkpoint_follows_no_link_that_waits_for_it(tmp_path: Path) -> None:
    """The link is replaced by the file; what it led to is as it was, and nobody else reads the guest's state."""
    kept = tmp_path / "shadow"
    kept.write_text("precious")
    (tmp_path / "out.mgs").symlink_to(kept)
    before = os.umask(0)
    try:
        assert _write(tmp_path / "out.mgs", [b"snap", b"shot"]) == 8
    finally:
        os.umask(before)
    assert kept.read_text() == "precious"
    assert not (tmp_path / "out.mgs").is_symlink()
    assert (tmp_path / "out.mgs").read_bytes() == b"snapshot"
    assert stat.S_IMODE((tmp_path / "out.mgs").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mgs", "shadow"]
