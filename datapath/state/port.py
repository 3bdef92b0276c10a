"""Kind `port`: what a port is, apart from its policy and its tables. One record a port."""

from __future__ import annotations

from datapath.state.kind import Kind, Nature

PORT = Kind(
    name="port",
    version=1,
    nature=Nature.CONFIGURATION | Nature.ACCOUNTING,
    key=("mac",),
    fields={
        "mac": (str,),  # aa:bb:cc:dd:ee:ff, lower case; identifies the NIC within its VM
        "network": (str,),  # name of the network, the same in the whole cluster
        "addresses": (list,),  # IPv4 and IPv6 addresses the guest may use, as text
        "antispoof": (bool,),
        "learning": (bool,),  # accept mid-stream connections (first installation on a host with running VMs)
        "trunk": (dict,),  # VLAN id (text) -> network of tagged frames; {} for an access port
        "mtu": (int,),
        "connections_max": (int,),  # size of the connection table
        "learned_max": (int,),  # L2 addresses that may be learned behind the port
        "timeouts_ms": (dict,),  # name of state.conntrack.TIMEOUTS -> milliseconds; a missing one is the default
        "policy": (str,),  # name of the policy, "" none: everything new is dropped
        "revision": (int,),  # of this configuration, given by the coordinator
        "counters": (dict,),  # accounting: name -> count, as in PortStatus.counters; comes with settle only
    },
    accounting=("counters",),
    defaults={
        "addresses": [],
        "antispoof": True,
        "learning": False,
        "trunk": {},
        "mtu": 1500,
        "connections_max": 65_536,
        "learned_max": 16,
        "timeouts_ms": {},
        "policy": "",
        "revision": 0,
    },
)
