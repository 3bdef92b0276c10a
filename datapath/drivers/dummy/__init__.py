"""A switch in memory: the same interface and the same contract as a real one, without root, threads or a kernel.

For tests of what runs a switch, and for simulating thousands of hosts in one process. It is honest about what it holds
(ports, tables, change tracking, gates, holds, redirects, leases, counters) and forwards frames by MAC between the ports
of switches that share a fabric. It judges no frame, learns nothing and expires nothing: what a kernel would change in
its tables by itself, a test changes with `load` on the active port.
"""

from datapath.drivers.dummy.driver import DummyDriver
from datapath.drivers.dummy.switch import fabric

__all__ = ["DummyDriver", "fabric"]
