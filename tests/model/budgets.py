"""How far the searches go. Each is complete within its budget."""

from __future__ import annotations

from tests.model.world import Budget

SMALL = (
    Budget(),
    Budget(dry_run=True),
    Budget(aborts=1),
    Budget(returns=1),
    Budget(self_stops=1),
    Budget(deaths=1),
    Budget(plains=1),
    Budget(second=True),
    Budget(swaps=1),
    Budget(losses=1),
    Budget(detaches=1),
    Budget(outruns=1),
    Budget(disks=1),
    Budget(fails=1),
    Budget(cuts=1),
    Budget(crashes=1, dies="A"),
    Budget(crashes=1, dies="C"),
    Budget(crashes=1, dies="A", returns=1),
    Budget(frames="to", returns=1),
    Budget(strict=True, returns=1),
    Budget(hypervisor=False, cuts=1),
    Budget(hypervisor=False, crashes=1, dies="A"),
)
"""What `make test` searches."""

FULL = (
    Budget(crashes=1, dies="B"),
    Budget(lates=1),
    Budget(copies=1),
    Budget(frames="to", self_stops=1),
    Budget(frames="from", self_stops=1),
    Budget(frames="to", crashes=1, dies="A"),
    Budget(frames="to", crashes=1, dies="B"),
    Budget(frames="to", outruns=1),
    Budget(self_stops=1, outruns=1),
    Budget(outruns=2, returns=1),
    Budget(crashes=1, dies="A", outruns=1),
    Budget(self_stops=1, returns=1),
    Budget(aborts=1, returns=1),
    Budget(aborts=1, self_stops=1),
    Budget(deaths=1, aborts=1),
    Budget(deaths=1, cuts=1),
    Budget(cuts=1, self_stops=1),
    Budget(crashes=1, dies="A", self_stops=1),
    Budget(crashes=1, dies="B", self_stops=1),
    Budget(crashes=1, dies="C", aborts=1),
    Budget(crashes=1, dies="A", disks=1),
    Budget(strict=True, crashes=1, dies="A"),
    Budget(strict=True, crashes=1, dies="B"),
    Budget(strict=True, cuts=1, self_stops=1),
    Budget(hypervisor=False, cuts=1, aborts=1),
    Budget(hypervisor=False, crashes=1, dies="B"),
    Budget(hypervisor=False, crashes=1, dies="C"),
    Budget(hypervisor=False, crashes=1, dies="A", cuts=1),
    Budget(detaches=2),
)
"""What `make model` searches besides."""
