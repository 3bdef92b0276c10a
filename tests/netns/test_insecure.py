# SPDX-License-Identifier: GPL-2.0-only
"""Without certificates, where it is written so: the daemons work as with them, and whoever reaches them may do all."""

from __future__ import annotations

import json

from migrator.lab.cluster import Cluster


def test_daemons_that_are_told_to_be_insecure_work() -> None:
    with Cluster(("h1",), tls=False) as cluster:
        assert not (cluster.directory / "pki").exists()
        listed = json.loads(cluster.cli("host", "list", "--json").stdout)
        assert [(host["name"], host["connected"]) for host in listed] == [("h1", True)]


def test_with_certificates_nobody_gets_in_without() -> None:
    """The same command, by the fabric's address, once with the operator's certificate and once without."""
    with Cluster(("h1",)) as cluster:
        assert cluster.cli("host", "list").returncode == 0
        cluster.tls = False
        refused = cluster.cli("host", "list")
        assert refused.returncode == 32 and "our certificate is missing" in refused.stderr
