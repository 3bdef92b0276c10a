"""What rules say of mark and label, in the kernel's layout (struct acl_label)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf import layout
from datapath.errors import UnsupportedKind
from datapath.state.acl import LABELS
from datapath.state.kind import Record
from datapath.state.labels import MARK_BITS, parse

LABEL_RULES_MAX = 256
"""Of a policy; lib/label.h visits them one by one. types.h has the same number."""


def validate(rule: Record) -> None:
    """Raises ValueError for a rule that asks or gives what cannot be."""
    for name, bits in LABELS.items():
        if name in rule:
            try:
                parse(rule[name], bits)
            except ValueError as error:
                raise ValueError(f"{name} {rule[name]!r}: {error}") from None
    given = [name for name in ("set_mark", "set_label") if name in rule]
    if given and rule["action"] != "allow":
        raise ValueError(f"{given[0]} goes with action allow: who is not let in keeps nothing")


def compile_labels(ranked: Sequence[Record]) -> tuple[NDArray[np.uint16], np.ndarray]:
    """(element of the table or 0, by rank; the table). Rules that say the same share an element; the first is empty.

    Raises UnsupportedKind when more rules speak of labels than the switch looks at.
    """
    elements: dict[tuple[str, ...], int] = {}
    numbers = np.zeros(len(ranked), np.uint16)
    for rank, rule in enumerate(ranked):
        if not LABELS.keys().isdisjoint(rule):
            words = tuple(rule.get(name, "") for name in LABELS)
            numbers[rank] = elements.setdefault(words, len(elements) + 1)
    speaking = np.count_nonzero(numbers)
    if speaking > LABEL_RULES_MAX:
        raise UnsupportedKind(
            f"a policy with {speaking} rules about marks and labels, the switch looks at {LABEL_RULES_MAX}",
            hint="merge them: one rule may have many prefixes and ports",
        )
    table = np.zeros(1 + len(elements), layout.ACL_LABEL)
    for words, number in elements.items():
        for name, text in zip(LABELS, words, strict=True):
            if text:
                _fill(table[number], name, text)
    return numbers, table


def _fill(element: np.void, name: str, text: str) -> None:
    value, mask = parse(text, LABELS[name])
    for field, number in ((name, value), (f"{name}_mask", mask)):
        element[field] = number if LABELS[name] == MARK_BITS else np.frombuffer(number.to_bytes(16, "big"), ">u8")
