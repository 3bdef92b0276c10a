# SPDX-License-Identifier: GPL-2.0-only
"""Typed map handles on the kernel's own maps."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from datapath.drivers.ebpf import syscall
from datapath.drivers.ebpf.maps import Mapped, Outer, Refused, Table, Template, possible_cpus
from datapath.drivers.ebpf.uapi import F_MMAPABLE, F_NO_PREALLOC, MapType, Update
from datapath.errors import KernelError

pytestmark = pytest.mark.root

KEY = np.dtype([("addr", ">u4", 4), ("port", ">u2"), ("pad", "<u2"), ("more", "<u4", 5)])
VALUE = np.dtype([("word", "<u8"), ("seen", "<u8"), ("counts", "<u8", 6)])
MANY = 100_000


def records(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    keys, values = np.zeros(count, KEY), np.zeros(count, VALUE)
    keys["addr"][:, 3] = np.arange(first, first + count)
    values["word"] = np.arange(first, first + count) * 7 + 1
    return keys, values


@pytest.fixture
def table() -> Iterator[Table]:
    with Table.make(KEY, VALUE, MANY) as made:
        yield made


def by_key(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys["addr"][:, 3])
    return keys[order], values[order]


def test_one_element_comes_back_as_it_went_in(table: Table) -> None:
    keys, values = records(1, 5)
    assert table.get(keys[0]) is None
    table.set(keys[0], values[0], Update.NOEXIST)
    assert table.get(keys[0]) == values[0]
    with pytest.raises(KernelError) as raised:
        table.set(keys[0], values[0], Update.NOEXIST)
    assert raised.value.errno == errno.EEXIST
    assert table.delete(keys[0])
    assert not table.delete(keys[0])


@pytest.mark.alone
def test_a_hundred_thousand_entries_go_round(table: Table) -> None:
    keys, values = records(MANY)
    began = time.perf_counter()
    assert table.load(keys, values).done == MANY
    loaded = time.perf_counter()
    found = by_key(*table.read())
    dumped = time.perf_counter()
    assert np.array_equal(found[0], keys)
    assert np.array_equal(found[1], values)
    taken = by_key(*table.take_all())
    assert np.array_equal(taken[1], values)
    assert len(table.keys()) == 0
    assert loaded - began < 2.0, "slower than 50,000 entries/s"
    assert dumped - loaded < 1.0, "slower than 100,000 entries/s"


def test_a_dump_grows_its_batch_to_the_fullest_bucket(table: Table) -> None:
    keys, values = records(MANY)
    table.load(keys, values)
    assert sum(len(part) for part, _ in table.dump(batch=1)) == MANY


def test_a_full_table_names_what_it_refused(table: Table) -> None:
    keys, values = records(MANY + 10)
    done = table.load(keys, values)
    assert done.done == MANY
    assert done.refused == [Refused(index, errno.E2BIG) for index in range(MANY, MANY + 10)]


def test_a_load_goes_on_past_an_element_that_is_refused() -> None:
    with Table.make("<u4", VALUE, 8, flags=0, type_=MapType.ARRAY) as array:
        _, values = records(6)
        done = array.load(np.array([1, 9, 2, 8, 3, 4]), values)
        assert done.done == 4
        assert done.refused == [Refused(1, errno.E2BIG), Refused(3, errno.E2BIG)]
        assert [int(array.get(index)["word"]) for index in (1, 2, 3, 4)] == [1, 15, 29, 36]


def test_bulk_delete_takes_missing_keys(table: Table) -> None:
    keys, values = records(100)
    table.load(keys[::2], values[::2])
    assert table.delete_many(keys) == 50
    assert len(table.keys()) == 0


def test_a_per_cpu_map_has_an_axis_of_cpus() -> None:
    fd = syscall.map_create(MapType.PERCPU_ARRAY, 4, 12, 4)
    with Table(fd, "<u4", np.dtype([("a", "<u4"), ("b", "<u4", 2)])) as counters:
        value = np.zeros(possible_cpus(), counters.value)
        value["a"] = np.arange(possible_cpus()) + 1
        counters.set(2, value)
        assert list(counters.get(2)["a"]) == list(range(1, possible_cpus() + 1))
        keys, values = counters.read()
        assert values.shape == (4, possible_cpus())
        assert list(values["a"].sum(axis=1)[keys == 2]) == [value["a"].sum()]


def test_inner_tables_are_reopened_by_the_outer_value() -> None:
    template = Template(MapType.HASH, KEY, VALUE, 1024, F_NO_PREALLOC)
    first = Table.make(KEY, VALUE, 1024)
    with Outer(syscall.map_create(MapType.ARRAY_OF_MAPS, 4, 4, 8, inner_fd=first.fd), template) as outer:
        first.close()
        keys, values = records(3)
        with outer.new(4096) as inner:
            inner.load(keys, values)
            outer.put(5, inner)
        assert outer.inner(4) is None
        with outer.inner(5) as again:  # type: ignore[union-attr]
            assert again.entries == 4096
            assert again.get(keys[1]) == values[1]
        assert outer.remove(5)
        assert outer.inner(5) is None


def test_a_mapped_word_is_the_map_s_own() -> None:
    fd = syscall.map_create(MapType.ARRAY, 4, VALUE.itemsize, 100, flags=F_MMAPABLE)
    with Table(os.dup(fd), "<u4", VALUE) as table, Mapped(fd, VALUE) as mapped:
        mapped.store(99, "seen", 1 << 63 | 5)
        assert table.get(99)["seen"] == 1 << 63 | 5
        table.set(7, (1, 2, (3,) * 6))
        assert mapped.view[7]["counts"].tolist() == [3] * 6
        assert mapped.load(7, "word") == 1
        with pytest.raises(KernelError):
            mapped.store(100, "word", 0)
        with pytest.raises(KernelError):
            mapped.store(0, "counts", 0)


def test_sizes_that_are_not_the_map_s_are_refused() -> None:
    fd = syscall.map_create(MapType.HASH, 8, 8, 1)
    with pytest.raises(KernelError, match="8, 8"):
        Table(fd, "<u4", "<u8")
