"""Another mark and label for connections that are there, by word of an operator.

A VM's lane does other things in between: a switchover does not wait for a large table, and once it has begun nothing
more is changed at the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from datapath.errors import NotReady, UnsupportedKind
from datapath.provider import Driver, PortRef, PortState
from datapath.state.conntrack import CONNTRACK, RELABELLED
from datapath.state.kind import Columns, Table
from datapath.state.labels import LABEL_BITS, MARK_BITS, parse
from migrator._pb import migrator_pb2 as pb
from migrator.agent.end import Surroundings
from migrator.errors import ConfigInvalid
from migrator.watching.match import Filter
from migrator.watching.wire import of_messages

PIECE = 8192
"""Connections that are changed while nobody else has the VM's lane."""
_CONNECTION = 0  # column `type`; the others are fragments on their way


class Relabelling:
    """What is asked, and what came of it so far. Raises ConfigInvalid for a request that says nothing or nonsense."""

    def __init__(self, request: pb.RelabelRequest) -> None:
        if not request.mark and not request.label:
            raise ConfigInvalid("neither a mark nor a label is given", hint="one as VALUE or VALUE/MASK")
        self._mark = _parsed("mark", request.mark, MARK_BITS)
        self._label = _parsed("label", request.label, LABEL_BITS)
        self._filter = Filter(CONNTRACK, of_messages(request.matches))
        self.matched = 0
        self.changed = 0

    async def carry_out(self, around: Surroundings, refs: Iterable[PortRef], switching: Callable[[str], bool]) -> None:
        """Change the connections of these ports. `switching(vm)`: is the VM's lane needed for a switchover?

        Raises UnsupportedKind, and NotReady, which says what was changed before.
        """
        for ref in refs:
            status = await around.call(ref.vm, around.driver.port, ref)
            if status.state is not PortState.ACTIVE:  # also where nothing would match: what is here is not the VM's
                raise self._too_late(f"port {ref.mac} is {status.state} here")
            pieces = self.pieces(around.driver, ref)
            while (piece := await around.call(ref.vm, next, pieces, None)) is not None:
                if switching(ref.vm):
                    raise self._too_late(f"VM {ref.vm} is just being switched over to another host")
                try:
                    await around.call(ref.vm, self.change, around.driver, ref, piece)
                except NotReady as error:
                    raise self._too_late(error.message) from None

    def _too_late(self, reason: str) -> NotReady:
        before = f"; {self.changed} connections were changed before, and go along" if self.changed else ""
        return NotReady(f"{reason}{before}", hint="do it again when the VM has moved, on the host where it is then")

    def pieces(self, driver: Driver, ref: PortRef) -> Iterator[Columns]:
        """Connections of a port that are asked for: keys, id, mark and label as they are. Raises UnsupportedKind."""
        if CONNTRACK.name not in driver.kinds():
            raise UnsupportedKind(f"driver {driver.name} tracks no connections")
        for table in driver.dump(ref, CONNTRACK.name):
            columns = self._chosen(table)
            for at in range(0, len(columns["id"]), PIECE):
                yield {name: array[at : at + PIECE] for name, array in columns.items()}

    def change(self, driver: Driver, ref: PortRef, piece: Columns) -> None:
        """Give them what is asked. Raises NotReady."""
        self.matched += len(piece["id"])
        self.changed += driver.relabel(ref, self._marked(piece))

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
