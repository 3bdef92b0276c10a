# SPDX-License-Identifier: GPL-2.0-only
"""Compile and load switch.bpf.c for tests: an own bpffs, libbpf through ctypes, BPF_PROG_RUN with a chosen device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from . import coverage
from .model import BPF_SOURCES, CLANG, MODEL
from .sysbpf import ARRAY, HASH, LPM_TRIE, PERCPU_ARRAY, PERCPU_HASH, Map, Run, prog_run

_SK_BUFF_SIZE = 192


class _OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts of libbpf 1.1, as far as tests set it."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("stub", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
        ("kernel_log_buffer", ctypes.c_char_p),
        ("kernel_log_size", ctypes.c_size_t),
        ("kernel_log_level", ctypes.c_uint32),
    )


def _libbpf() -> ctypes.CDLL:
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    for name, result, arguments in (
        ("bpf_object__open_file", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]),
        ("bpf_object__load", ctypes.c_int, [ctypes.c_void_p]),
        ("bpf_object__close", None, [ctypes.c_void_p]),
        ("bpf_object__next_map", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]),
        ("bpf_object__next_program", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]),
        ("bpf_map__name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("bpf_map__fd", ctypes.c_int, [ctypes.c_void_p]),
        ("bpf_program__name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("bpf_program__fd", ctypes.c_int, [ctypes.c_void_p]),
        ("bpf_program__insns", ctypes.c_void_p, [ctypes.c_void_p]),
        ("bpf_program__insn_cnt", ctypes.c_size_t, [ctypes.c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def compile_object(source: Path, target: Path, *defines: str) -> Path:
    if coverage.directory():
        return coverage.compile_object(source, target, *defines)
    subprocess.run([*CLANG, f"-I{BPF_SOURCES}", *defines, "-c", source, "-o", target], check=True)
    return target


@contextlib.contextmanager
def private_bpffs() -> Iterator[Path]:
    """A bpffs of our own on a temporary directory."""
    with tempfile.TemporaryDirectory(prefix=f"bpffs-{os.getpid()}-") as directory:
        subprocess.run(["mount", "-t", "bpf", "bpf", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


class Switch:
    """The loaded object. `maps` and `programs` by name; everything is gone at the end of the `with`.

    Loading takes a second, most of it in the verifier: tests share one and call `reset` after each.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self._path = path
        self._linked: list[tuple[str, int, Map]] = []
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, int] = {}
        self.instructions: dict[str, bytes] = {}

    def __enter__(self) -> Switch:
        with self._stack:
            self._load()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            self.reset()

    def _load(self) -> None:
        path = self._path
        if path is None:
            directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            path = compile_object(BPF_SOURCES / "switch.bpf.c", directory / "switch.bpf.o")
        self.pins = self._stack.enter_context(private_bpffs())
        library = _libbpf()
        log = ctypes.create_string_buffer(1 << 24)
        options = _OpenOptions(
            size=ctypes.sizeof(_OpenOptions),
            pin_root_path=os.fsencode(self.pins),
            kernel_log_buffer=ctypes.cast(log, ctypes.c_char_p),
            kernel_log_size=len(log),
        )
        opened = library.bpf_object__open_file(os.fsencode(path), ctypes.byref(options))
        if not opened:
            raise OSError(ctypes.get_errno(), "bpf_object__open_file", str(path))
        self._stack.callback(library.bpf_object__close, opened)
        result = library.bpf_object__load(opened)
        if result:
            raise OSError(-result, f"bpf_object__load: {log.value[-4000:].decode(errors='replace')}", str(path))
        for item in _walk(library.bpf_object__next_map, opened):
            name = library.bpf_map__name(item).decode()
            self.maps[name] = Map.from_fd(name, library.bpf_map__fd(item))
        for item in _walk(library.bpf_object__next_program, opened):
            name = library.bpf_program__name(item).decode()
            self.programs[name] = library.bpf_program__fd(item)
            instructions = (library.bpf_program__insns(item), 8 * library.bpf_program__insn_cnt(item))
            self.instructions[name] = ctypes.string_at(*instructions)
        self._stack.callback(coverage.collect, path, self.maps)

    def run(self, program: str, frame: bytes, ifindex: int = 0, *, repeat: int = 0, **fields: int) -> Run:
        """BPF_PROG_RUN of a tc program. ifindex: of the caller's namespace; fields: mark, gso_size, gso_segs."""
        return prog_run(self.programs[program], frame, sk_buff(ifindex, **fields), repeat)

    def call(self, program: str, context: ctypes.Structure) -> int:
        """BPF_PROG_RUN of a SYSCALL program; `context` has what the program wrote to it. Returns its result."""
        run = prog_run(self.programs[program], b"", bytes(context))
        ctypes.memmove(ctypes.addressof(context), run.context, len(run.context))
        return ctypes.c_int32(run.verdict).value

    def get(self, name: str, kind: str, *key: int) -> Any:
        """The element at a u32 (or several u32) key as a structure of the model; None if there is none."""
        value = self.maps[name].lookup(struct.pack(f"={len(key)}I", *key))
        return None if value is None else getattr(MODEL, kind).from_buffer_copy(value)

    def put(self, name: str, key: int | bytes | ctypes.Structure, value: int | bytes | ctypes.Structure) -> None:
        """Store an element. An int is a u32 key, or a value of the map's size."""
        target = self.maps[name]
        raw_key = key.to_bytes(target.key_size, "little") if isinstance(key, int) else bytes(key)
        raw = value.to_bytes(target.value_size, "little") if isinstance(value, int) else bytes(value)
        target.update(raw_key, raw)

    def inner(self, outer: str, key: int, template: str, max_entries: int = 0) -> Map:
        """A new map like `template`, linked into `outer` at `key` until `reset`."""
        made = self.maps[template].like(f"{outer}[{key}]", max_entries)
        self._linked.append((outer, key, made))
        self.put(outer, key, struct.pack("=I", made.fd))
        return made

    def unlink(self) -> None:
        """Take out and close the maps that `inner` made."""
        for outer, key, made in self._linked:
            with contextlib.suppress(FileNotFoundError):
                self.maps[outer].delete(struct.pack("=I", key))
            os.close(made.fd)
        self._linked.clear()

    def reset(self) -> None:
        """Empty all maps: the switch is as just loaded, but for what waits in the ring."""
        self.unlink()
        for target in self.maps.values():
            constant = "." in target.name  # sections of the object, as .rodata
            if target.kind in (HASH, PERCPU_HASH, LPM_TRIE, ARRAY, PERCPU_ARRAY) and not constant:
                target.clear()


def sk_buff(ifindex: int, *, mark: int = 0, gso_size: int = 0, gso_segs: int = 0) -> bytes:
    """struct __sk_buff for BPF_PROG_RUN; it takes no fields but these."""
    context = bytearray(_SK_BUFF_SIZE)
    for offset, value in ((8, mark), (40, ifindex), (164, gso_segs), (176, gso_size)):
        struct.pack_into("=I", context, offset, value)
    return bytes(context)


def _walk(following: Any, owner: int) -> Iterator[int]:
    item = following(owner, None)
    while item:
        yield item
        item = following(owner, item)
