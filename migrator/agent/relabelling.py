"""Another mark and label for connections that are there, by word of an operator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datapath.errors import UnsupportedKind
from datapath.provider import Driver, PortRef
from datapath.state.conntrack import CONNTRACK, RELABELLED
from datapath.state.kind import Columns, Table
from datapath.state.labels import LABEL_BITS, MARK_BITS, parse
from migrator._pb import migrator_pb2 as pb
from migrator.errors import ConfigInvalid
from migrator.watching.match import Filter, Match

_CONNECTION = 0  # column `type`; the others are fragments on their way


class Relabelling:
    """What is asked, and what came of it so far. Raises ConfigInvalid for a request that says nothing or nonsense."""

    def __init__(self, request: pb.RelabelRequest) -> None:
        if not request.mark and not request.label:
            raise ConfigInvalid("neither a mark nor a label is given", hint="one as VALUE or VALUE/MASK")
        self._mark = _parsed("mark", request.mark, MARK_BITS)
        self._label = _parsed("label", request.label, LABEL_BITS)
        matches = [Match(one.field, tuple(one.values), one.negated) for one in request.matches]
        self._filter = Filter(CONNTRACK, matches)
        self.matched = 0
        self.changed = 0

    def carry_out(self, driver: Driver, ref: PortRef) -> None:
        """Change the connections of one port. Raises UnsupportedKind, NotReady."""
        if CONNTRACK.name not in driver.kinds():
            raise UnsupportedKind(f"driver {driver.name} tracks no connections")
        for table in list(driver.dump(ref, CONNTRACK.name)):
            columns = self._chosen(table)
            if len(columns["id"]):
                self.matched += len(columns["id"])
                self.changed += driver.relabel(ref, self._marked(columns))

    def _chosen(self, table: Table) -> Columns:
        every = table.columns or {}
        chosen = self._filter.mask(table) & (every["type"] == _CONNECTION)
        return {name: every[name][chosen] for name in (*CONNTRACK.key, *RELABELLED)}

    def _marked(self, columns: Columns) -> Columns:
        value, mask = (_bytes(number) for number in self._label)
        label = np.ascontiguousarray(columns["label"]).view(np.uint8).reshape(-1, LABEL_BITS // 8) & ~mask | value
        mark = columns["mark"] & np.uint32(~self._mark[1] & 0xFFFFFFFF) | np.uint32(self._mark[0])
        return {**columns, "mark": mark.astype("<u4"), "label": label.view("V16").ravel()}


def _bytes(number: int) -> NDArray[np.uint8]:
    return np.frombuffer(number.to_bytes(LABEL_BITS // 8, "big"), np.uint8)


def _parsed(name: str, text: str, bits: int) -> tuple[int, int]:
    """(value, mask); no bit for no text."""
    try:
        return parse(text, bits) if text else (0, 0)
    except ValueError as error:
        raise ConfigInvalid(f"{name}: {error}, not {text[:80]!r}") from None
