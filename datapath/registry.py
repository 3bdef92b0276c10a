"""The kinds of state there are, and the drivers that are installed. The migration engine walks these and names none."""

from __future__ import annotations

from importlib.metadata import entry_points

from datapath.errors import FeatureMissing
from datapath.provider import Driver
from datapath.state.acl import ACL
from datapath.state.conntrack import CONNTRACK
from datapath.state.fdb import FDB
from datapath.state.flow_export import FLOW_EXPORT
from datapath.state.flows import FLOWS
from datapath.state.kind import Kind
from datapath.state.mirror import MIRROR
from datapath.state.port import PORT
from datapath.state.qos import QOS
from datapath.state.remap import REMAP
from datapath.state.sampling import SAMPLING
from datapath.state.window import WINDOW

_ALL = (
    PORT,
    ACL,
    FDB,
    WINDOW,
    CONNTRACK,
    MIRROR,
    REMAP,
    QOS,
    SAMPLING,
    FLOW_EXPORT,
    FLOWS,
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""In the order in which a destination loads them."""


def driver(name: str) -> type[Driver]:
    """Class of the driver that is installed under `name`.

    Raises FeatureMissing when there is none.
    """
    found = {point.name: point for point in entry_points(group="migrator.drivers")}
    if name not in found:
        raise FeatureMissing(f"no driver {name!r}", hint=f"installed: {', '.join(sorted(found)) or 'none'}")
    loaded: type[Driver] = found[name].load()
    return loaded
