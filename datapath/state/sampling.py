"""Kind `sampling`: sFlow version 5 of a port (https://sflow.org/sflow_version_5.txt). One record a port.

The port is a sub-agent of its own. Its agent address, its number and its interface are configured, not taken from a
host, and what collectors were told goes along: so they see one source that never begins anew, wherever the VM runs.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from datapath.state.document import Document
from datapath.state.kind import Claim, Kind, Nature, Record
from datapath.state.quantity import Size

COLLECTOR_PORT = 6343  # IANA: sflow
COLLECTORS_MAX = 8
RATE_MAX = 1 << 24
HEADER_MIN, HEADER_MAX = 18, 128
POLLING_MAX_S = 3600
INTERFACE_MAX = (1 << 24) - 1
"""The index of a data source has 24 bits."""
COUNTERS = ("packets_from", "bytes_from", "packets_to", "bytes_to")
_LIVE_NUMBERS = ("age_ns", "pool", "next", "drops", "datagrams", "unsent", "flow_samples", "counter_samples")


def _host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError(f"expected an IPv4 or IPv6 address, not {text!r}") from None


def endpoint(text: str) -> tuple[str, int]:
    """Address and port of "192.0.2.9", "192.0.2.9:6343", "2001:db8::9" or "[2001:db8::9]:6343". Raises ValueError."""
    host, colon, port = text, "", ""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
    elif text.count(":") == 1:
        host, colon, port = text.partition(":")
    if colon and not (colon == ":" and port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise ValueError(f"expected a port in 1..65535 behind the address, not {text!r}")
    return _host(host), int(port) if colon else COLLECTOR_PORT


def _collector(text: str) -> str:
    endpoint(text)
    return text


def _seconds(value: object) -> object:
    """20, "20", "20s" """
    return value.removesuffix("s").strip() if isinstance(value, str) else value


class SamplingDocument(Document):
    """`{rate: 1000, agent: 10.0.0.1, sub_agent: 17, collectors: ["192.0.2.9:6343"]}`."""

    rate: int = Field(ge=1, le=RATE_MAX)
    agent: Annotated[str, AfterValidator(_host)]
    sub_agent: int = Field(ge=1, le=INTERFACE_MAX)
    collectors: tuple[Annotated[str, AfterValidator(_collector)], ...] = Field(min_length=1, max_length=COLLECTORS_MAX)
    interface: int | None = Field(None, ge=1, le=INTERFACE_MAX)
    network_interface: int = Field(0, ge=0, le=INTERFACE_MAX)
    header: Annotated[Size, Field(ge=HEADER_MIN, le=HEADER_MAX)] = HEADER_MAX
    polling: Annotated[int, BeforeValidator(_seconds), Field(ge=0, le=POLLING_MAX_S)] = 20

    def records(self) -> list[Record]:
        return [
            {
                "sub_agent": self.sub_agent,
                "agent": self.agent,
                "interface": self.interface or self.sub_agent,
                "network_interface": self.network_interface,
                "rate": self.rate,
                "header_bytes": self.header,
                "polling_s": self.polling,
                "collectors": [list(endpoint(text)) for text in dict.fromkeys(self.collectors)],
            }
        ]


SAMPLING = Kind(
    name="sampling",
    version=1,
    nature=Nature.CONFIGURATION | Nature.LIVE,
    key=("sub_agent",),
    fields={
        "sub_agent": (int,),  # 1..2^24-1
        "agent": (str,),  # its address in datagrams, whatever host sends them
        "interface": (int,),  # ifIndex of the port, and its data source: 1..2^24-1
        "network_interface": (int,),  # ifIndex of what is beyond the switch, 0 unknown
        "rate": (int,),  # one of so many frames on the wire
        "header_bytes": (int,),  # of each sampled frame
        "polling_s": (int,),  # between counter samples, 0 none
        "collectors": (list,),  # [address, UDP port] each
        "age_ns": (int,),  # live, all that follow: since the sub-agent began
        "pool": (int,),  # frames that could have been sampled
        "next": (int,),  # number in the pool of the frame that is sampled next, 0 not drawn yet
        "drops": (int,),  # samples that were lost: too many, or no room
        "datagrams": (int,),  # sequence numbers: the last that were used
        "unsent": (int,),  # datagrams that could not be sent to a collector
        "flow_samples": (int,),
        "counter_samples": (int,),
        "counters": (dict,),  # name of COUNTERS -> the port's totals when it stopped
    },
    defaults={"network_interface": 0, "header_bytes": HEADER_MAX, "polling_s": 20},
    live=(*_LIVE_NUMBERS, "counters"),
    document=SamplingDocument,
    claim=Claim(("sub_agent", "agent"), "sub-agent"),
)


def fault(record: Record) -> str:
    """Why a record whose types are right cannot be applied, "" if it can: it may come from another version's host."""
    limits = {
        "sub_agent": (1, INTERFACE_MAX),
        "interface": (1, INTERFACE_MAX),
        "network_interface": (0, INTERFACE_MAX),
        "rate": (1, RATE_MAX),
        "header_bytes": (HEADER_MIN, HEADER_MAX),
        "polling_s": (0, POLLING_MAX_S),
        **dict.fromkeys(_LIVE_NUMBERS, (0, (1 << 62) - 1)),
    }
    for name, (least, most) in limits.items():
        if not least <= record.get(name, least) <= most:
            return f"{name} {record[name]} is not in {least}..{most}"
    counters = record.get("counters", {})
    if not all(name in COUNTERS and type(value) is int and 0 <= value < 1 << 62 for name, value in counters.items()):
        return f"counters are whole numbers under the names {', '.join(COUNTERS)}"
    return _fault_of_addresses(record)


def _fault_of_addresses(record: Record) -> str:
    collectors = record["collectors"]
    if not 1 <= len(collectors) <= COLLECTORS_MAX:
        return f"{len(collectors)} collectors: there may be 1 to {COLLECTORS_MAX}"
    for one in collectors:
        whole = isinstance(one, list | tuple) and len(one) == 2 and type(one[0]) is str and type(one[1]) is int
        if not whole or not _is_address(one[0]) or not 0 < one[1] < 1 << 16:
            return f"collector {one!r} is no address with a UDP port"
    return "" if _is_address(record["agent"]) else f"agent {record['agent']!r} is no address"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
