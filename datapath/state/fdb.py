"""Kind `fdb`: the VM's own L2 entries, learned and static. Entries of other VMs and hosts are not its state."""

from __future__ import annotations

from datapath.state.kind import Column, Kind, Nature

STATIC = 1 << 0
LOCATION = 1 << 1

FDB = Kind(
    name="fdb",
    version=1,
    nature=Nature.LIVE,
    key=("mac", "vlan"),
    columns={
        "mac": Column("V6"),
        "vlan": Column("<u2", 0),  # tag within a trunk port, 0 the port's own network
        "flags": Column("u1", 0, bits={STATIC: "STATIC", LOCATION: "LOCATION"}),  # STATIC | LOCATION
        "age_ns": Column("<u8", 0, volatile=True),
        "moves": Column("<u4", 0),
    },
)
