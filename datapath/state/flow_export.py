"""Kind `flow_export`: NetFlow v9 (RFC 3954) or IPFIX (RFC 7011) records of a port's connections, and where they go."""

from __future__ import annotations

import ipaddress
import zlib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from datapath.state.document import Document
from datapath.state.endpoint import endpoint
from datapath.state.kind import Kind, Nature, Record

COLLECTORS_MAX = 8
NAME = "flows"
"""A port has one exporter; this is its key."""
COUNTS = ("datagrams", "records", "errors", "lost_flows", "lost_packets", "lost_bytes")


def _version(value: object) -> object:
    return {"netflow": 9, "ipfix": 10}.get(value, value) if isinstance(value, str) else value


class FlowExportDocument(Document):
    """`flow_export` at a port."""

    version: Annotated[Literal[9, 10], BeforeValidator(_version)] = 10
    collectors: tuple[str, ...] = Field(min_length=1, max_length=COLLECTORS_MAX)
    source: str = ""
    domain: int = Field(default=0, ge=0, lt=1 << 32)
    active_timeout_s: int = Field(default=60, ge=1, le=86_400)
    inactive_timeout_s: int = Field(default=15, ge=1, le=86_400)
    template_refresh_s: int = Field(default=60, ge=1, le=86_400)

    @field_validator("collectors")
    @classmethod
    def _are_collectors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            endpoint(one)
        if len(set(value)) < len(value):
            raise ValueError("expected each collector once")
        return value

    @field_validator("source")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value:
            try:
                ipaddress.ip_address(value)
            except ValueError as error:
                raise ValueError(f"expected an address that the datagrams come from, not {value!r}") from error
        return value

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "name": NAME,
                "version": self.version,
                "collectors": list(self.collectors),
                "source": self.source,
                "domain": self.domain,
                "active_timeout_s": self.active_timeout_s,
                "inactive_timeout_s": self.inactive_timeout_s,
                "template_refresh_s": self.template_refresh_s,
            }
        ]


FLOW_EXPORT = Kind(
    name="flow_export",
    version=1,
    nature=Nature.CONFIGURATION | Nature.LIVE | Nature.ACCOUNTING,
    key=("name",),
    fields={
        "name": (str,),
        "version": (int,),  # 9 NetFlow v9, 10 IPFIX
        "collectors": (list,),  # "address:port"; every datagram goes to each
        "source": (str,),  # address that datagrams come from on every host; "" the host's own
        "domain": (int,),  # observation domain (IPFIX), source id (NetFlow); 0: made of the port's MAC
        "active_timeout_s": (int,),
        "inactive_timeout_s": (int,),
        "template_refresh_s": (int,),
        "sequence": (int,),  # live: of the next datagram (NetFlow) or record (IPFIX)
        "uptime_ms": (int,),  # live: of the exporter
        "template_age_ms": (int,),  # live: since the last template, -1 none was sent
        **dict.fromkeys(COUNTS, (int,)),  # accounting; errors: datagrams that a collector could not be sent
    },
    accounting=COUNTS,
    live=("sequence", "uptime_ms", "template_age_ms"),
    defaults={"source": "", "domain": 0, "active_timeout_s": 60, "inactive_timeout_s": 15, "template_refresh_s": 60},
    document=FlowExportDocument,
)


def domain_of(record: Record, mac: str) -> int:
    """The observation domain: the same on every host that the port comes to."""
    return int(record["domain"]) or zlib.crc32(mac.encode())
