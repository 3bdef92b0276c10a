# SPDX-License-Identifier: GPL-2.0-only
"""Which role may call which method: one table for all services. What is not in it nobody may call.

Where an agent is among them it may so for its own host only; what that means stands beside the method, and is checked
where the method is implemented (`Identity.require_host`).
"""

from __future__ import annotations

from collections.abc import Mapping

from migrator.errors import Forbidden
from migrator.security.identity import Identity, Role

_PACKAGE = "/migrator.v1."
_AGENT, _OPERATOR, _VIEWER = Role.AGENT, Role.OPERATOR, Role.VIEWER

METHODS: Mapping[str, tuple[tuple[Role, ...], str]] = {
    # method -> roles, and what binds an agent to its host
    "Coordinator/Attach": ((_AGENT,), "its Hello names its own host, and all it says is of that host"),
    "Coordinator/Apply": ((_OPERATOR,), ""),
    "Coordinator/Remove": ((_OPERATOR,), ""),
    "Coordinator/Show": ((_OPERATOR, _VIEWER), ""),
    "Coordinator/Hosts": ((_OPERATOR, _VIEWER), ""),
    "Coordinator/Migrate": (
        (_OPERATOR, _AGENT),
        "to its own host, a VM that its source's hypervisor is moving",
    ),
    "Coordinator/Migrations": ((_OPERATOR, _VIEWER, _AGENT), "sees those from and to its host"),
    "Coordinator/Follow": ((_OPERATOR, _VIEWER, _AGENT), "from or to its host"),
    "Coordinator/Abort": ((_OPERATOR, _AGENT), "from or to its host"),
    "Coordinator/Resolve": ((_OPERATOR,), ""),
    "Coordinator/Watch": ((_OPERATOR, _VIEWER), ""),
    "Coordinator/Declare": ((_AGENT,), "ports on its own host"),
    "Peer/Move": ((_AGENT,), "is the source that the coordinator's order names, and shows that order's token"),
    "Peer/Ask": ((_AGENT,), "is the source of the migration that it asks about, while that is in hand"),
    "Agent/Status": ((_OPERATOR, _VIEWER), ""),
    "Agent/Ports": ((_OPERATOR, _VIEWER), ""),
    "Agent/Dump": ((_OPERATOR,), ""),
    "Agent/Checkpoint": ((_OPERATOR,), ""),
    "Agent/Restore": ((_OPERATOR,), ""),
    "Agent/Trace": ((_OPERATOR,), ""),
    "Agent/Remains": ((_OPERATOR, _VIEWER), ""),
    "Agent/Relabel": ((_OPERATOR,), ""),
    "State/Watch": ((_OPERATOR,), ""),
}


def require_role(identity: Identity, method: str) -> None:
    """`method` as gRPC has it: /migrator.v1.Coordinator/Apply. Raises Forbidden."""
    roles, _ = METHODS.get(method.removeprefix(_PACKAGE), ((), ""))
    if identity.role in roles or (identity.role is Role.ANYONE and roles):
        return
    allowed = " or ".join(roles) or "nobody"
    called = method.rpartition(".")[2]
    raise Forbidden(f"{identity} may not call {called}", hint=f"who may: {allowed}; docs/security.md")
