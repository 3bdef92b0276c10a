"""The distribution's libbpf (1.0 and newer) through ctypes: open an object, size its maps, load it.

What libbpf says goes into the error of the call that failed, not to stderr. Source: /usr/include/bpf/libbpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datapath.errors import FeatureMissing, KernelError

SONAME = "libbpf.so.1"
_LINES = 30  # of libbpf's words that an error shows
_DOCTOR_HINT = "migrator doctor names what is missing"
_VERIFIER_HINT = "the kernel's verifier refuses the program: report it with this kernel's version"


class _OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts, up to what is set here: `size` tells libbpf where it ends."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
    )


_Print = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_pointer, _text, _int, _u32 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint32
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_set_print": (_pointer, (_pointer,)),
    "bpf_object__open_file": (_pointer, (_text, _pointer)),
    "bpf_object__load": (_int, (_pointer,)),
    "bpf_object__close": (None, (_pointer,)),
    "bpf_object__next_map": (_pointer, (_pointer, _pointer)),
    "bpf_object__next_program": (_pointer, (_pointer, _pointer)),
    "bpf_map__name": (_text, (_pointer,)),
    "bpf_map__fd": (_int, (_pointer,)),
    "bpf_map__type": (_int, (_pointer,)),
    "bpf_map__key_size": (_u32, (_pointer,)),
    "bpf_map__value_size": (_u32, (_pointer,)),
    "bpf_map__max_entries": (_u32, (_pointer,)),
    "bpf_map__map_flags": (_u32, (_pointer,)),
    "bpf_map__btf_key_type_id": (_u32, (_pointer,)),
    "bpf_map__btf_value_type_id": (_u32, (_pointer,)),
    "bpf_map__inner_map": (_pointer, (_pointer,)),
    "bpf_map__pin_path": (_text, (_pointer,)),
    "bpf_map__set_max_entries": (_int, (_pointer, _u32)),
    "bpf_program__name": (_text, (_pointer,)),
    "bpf_program__fd": (_int, (_pointer,)),
}


@cache
def library() -> ctypes.CDLL:
    """Raises FeatureMissing when libbpf is not installed."""
    try:
        loaded = ctypes.CDLL(SONAME, use_errno=True)
    except OSError:
        raise FeatureMissing(
            f"{SONAME} cannot be loaded", hint="install libbpf 1.0 or newer (Debian: libbpf1)"
        ) from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


@dataclass(frozen=True)
class Declared:
    """A map as the object declares it. Sizes in bytes; type ids are those of the object's BTF, 0 none."""

    name: str
    type: int
    key_size: int
    value_size: int
    entries: int
    flags: int
    key_type: int
    value_type: int
    pin: Path | None
    inner: Declared | None


class Object:
    """An opened BPF object; `load` puts it into the kernel. Close it in any case; its descriptors go with it."""

    def __init__(self, path: Path, pins: Path) -> None:
        """Open. Maps that are pinned by name get their pins under `pins`."""
        options = _OpenOptions(ctypes.sizeof(_OpenOptions), None, False, os.fsencode(pins))
        with _words() as words:
            self._object = library().bpf_object__open_file(os.fsencode(path), ctypes.byref(options))
            failed = ctypes.get_errno()
        if not self._object:
            raise KernelError(f"open {path}: {_last(words)}", failed, hint="build the BPF programs: make bpf")

    def close(self) -> None:
        if self._object:
            library().bpf_object__close(self._object)
            self._object = None

    def maps(self) -> Iterator[Declared]:
        return (_declared(item) for item in self._walk("map"))

    def resize(self, name: str, entries: int) -> None:
        result = library().bpf_map__set_max_entries(self._map(name), entries)
        if result:
            raise KernelError(f"resize map {name} to {entries}", -result)

    def load(self) -> None:
        """Load maps (pinned ones are reused) and programs. Raises KernelError with libbpf's last lines."""
        with _words() as words:
            result = library().bpf_object__load(self._object)
        if result:
            hint = _VERIFIER_HINT if -result in (errno.EACCES, errno.EINVAL) else _DOCTOR_HINT
            raise KernelError(f"load the BPF programs: {_last(words)}", -result, hint=hint)

    def map_fd(self, name: str) -> int:
        """Descriptor of a loaded map, the object's own."""
        return int(library().bpf_map__fd(self._map(name)))

    def programs(self) -> dict[str, int]:
        """Name -> descriptor of each program, the object's own; negative before `load`."""
        items = list(self._walk("program"))
        return {library().bpf_program__name(item).decode(): library().bpf_program__fd(item) for item in items}

    def _map(self, name: str) -> int:
        for item in self._walk("map"):
            if library().bpf_map__name(item).decode() == name:
                return item
        raise FeatureMissing(f"the BPF object has no map {name}", hint="build it from the same version: make bpf")

    def _walk(self, what: str) -> Iterator[int]:
        following = getattr(library(), f"bpf_object__next_{what}")
        item = following(self._object, None)
        while item:
            yield item
            item = following(self._object, item)


def _declared(item: int) -> Declared:
    lib = library()
    pin, inner = lib.bpf_map__pin_path(item), lib.bpf_map__inner_map(item)
    return Declared(
        lib.bpf_map__name(item).decode(),
        lib.bpf_map__type(item),
        lib.bpf_map__key_size(item),
        lib.bpf_map__value_size(item),
        lib.bpf_map__max_entries(item),
        lib.bpf_map__map_flags(item),
        lib.bpf_map__btf_key_type_id(item),
        lib.bpf_map__btf_value_type_id(item),
        Path(os.fsdecode(pin)) if pin else None,
        _declared(inner) if inner else None,
    )


_print_lock = threading.Lock()  # libbpf has one print function a process


@contextmanager
def _words() -> Iterator[deque[str]]:
    """What libbpf says meanwhile."""
    words: deque[str] = deque(maxlen=1000)
    vsnprintf = ctypes.CDLL(None).vsnprintf
    vsnprintf.argtypes = (_pointer, ctypes.c_size_t, _text, _pointer)

    def say(level: int, form: bytes, arguments: int) -> int:
        if level <= 1:  # warnings and information; not debug
            line = ctypes.create_string_buffer(1 << 16)
            vsnprintf(line, len(line), form, arguments)
            words.extend(line.value.decode(errors="replace").splitlines())
        return 0

    callback = _Print(say)
    with _print_lock:
        before = library().libbpf_set_print(ctypes.cast(callback, _pointer))
        try:
            yield words
        finally:
            library().libbpf_set_print(before)


def _last(words: deque[str]) -> str:
    lines = [line.removeprefix("libbpf: ") for line in words if line.strip()]
    return "\n".join(lines[-_LINES:]) or "libbpf says nothing"
