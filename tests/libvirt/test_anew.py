# SPDX-License-Identifier: GPL-2.0-only
"""What this machine was too slow for begins anew, with all that was made for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.lab.errors import TooSlow

MADE: list[bool] = []


@pytest.fixture(scope="module")
def number() -> Iterator[int]:
    MADE.append(True)
    yield len(MADE)
    MADE[-1] = False


def test_it_is_made_anew(number: int) -> None:
    if number == 1:
        raise TooSlow("as this test says")
    assert MADE == [False, True]


def test_what_the_next_test_uses_is_kept(number: int) -> None:
    assert number == 2
