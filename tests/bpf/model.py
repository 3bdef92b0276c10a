# SPDX-License-Identifier: GPL-2.0-only
"""The C data model (datapath/bpf/lib/types.h, maps.h) as ctypes, read from BTF so that tests never restate a layout.

`MODEL.port` is a ctypes.Structure, `MODEL.DROP_POLICY` the value of an enumerator or of an integer macro.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BPF_SOURCES = Path(__file__).resolve().parents[2] / "datapath" / "bpf"
CLANG = ["clang-19", "-O2", "-g", "-mcpu=v3", "-target", "bpf", "-Wall", "-Werror", "-I/usr/include/x86_64-linux-gnu"]
_HEADERS = ("types.h", "maps.h")
_INTS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_SIGNED = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}


class Model:
    """Attribute access to every structure, enumerator and integer macro of the headers."""

    def __init__(self, structures: dict[str, type[ctypes.Structure]], constants: dict[str, int]) -> None:
        self.structures = structures
        self.constants = constants

    def __getattr__(self, name: str) -> Any:
        for table in (self.structures, self.constants):
            if name in table:
                return table[name]
        raise AttributeError(f"neither a structure nor a constant of {', '.join(_HEADERS)}: {name}")


def build_model() -> Model:
    """Compile a unit that uses every type of the headers and read its BTF back."""
    text = "".join((BPF_SOURCES / "lib" / header).read_text() for header in _HEADERS)
    lines = ["#include <linux/bpf.h>", '#include "lib/maps.h"']
    for number, (kind, name) in enumerate(re.findall(r"^(struct|enum) (\w+) \{", text, re.M)):
        lines.append(f"{kind} {name} _use{number};")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "model.bpf.c"
        source.write_text("\n".join(lines) + "\n")
        target = source.with_suffix(".o")
        subprocess.run([*CLANG, f"-I{BPF_SOURCES}", "-c", source, "-o", target], check=True)
        dump = subprocess.run(["bpftool", "btf", "dump", "file", target, "-j"], check=True, capture_output=True)
        macros = subprocess.run([*CLANG, f"-I{BPF_SOURCES}", "-E", "-dM", source], check=True, capture_output=True)
    types = {entry["id"]: entry for entry in json.loads(dump.stdout)["types"]}
    constants = _enumerators(types) | _macros(macros.stdout.decode())
    return Model(_Builder(types).structures(), constants)


def _enumerators(types: dict[int, Any]) -> dict[str, int]:
    return {
        value["name"]: value["val"]
        for entry in types.values()
        if entry["kind"] in ("ENUM", "ENUM64")
        for value in entry["values"]
    }


def _macros(text: str) -> dict[str, int]:
    found = re.findall(r"^#define ([A-Z][A-Z0-9_]*) (0x[0-9a-fA-F]+|\d+)$", text, re.M)
    return {name: int(value, 0) for name, value in found}


class _Builder:
    def __init__(self, types: dict[int, Any]) -> None:
        self._types = types
        self._made: dict[int, Any] = {}

    def structures(self) -> dict[str, type[ctypes.Structure]]:
        return {
            entry["name"]: self._type(number)
            for number, entry in self._types.items()
            if entry["kind"] == "STRUCT" and entry["name"] != "(anon)"
        }

    def _type(self, number: int) -> Any:
        if number not in self._made:
            self._made[number] = self._make(self._types[number])
        return self._made[number]

    def _make(self, entry: dict[str, Any]) -> Any:
        kind = entry["kind"]
        if kind in ("TYPEDEF", "CONST", "VOLATILE"):
            return self._type(entry["type_id"])
        if kind in ("INT", "ENUM"):
            return (_SIGNED if entry.get("encoding") == "SIGNED" else _INTS)[entry["size"]]
        if kind == "ARRAY":
            return self._type(entry["type_id"]) * entry["nr_elems"]
        if kind in ("STRUCT", "UNION"):
            return self._compound(entry)
        return ctypes.c_void_p  # pointers in map definitions

    def _compound(self, entry: dict[str, Any]) -> Any:
        base = ctypes.Structure if entry["kind"] == "STRUCT" else ctypes.Union
        fields = [(m["name"], self._type(m["type_id"])) for m in entry["members"]]
        made = type(entry["name"], (base,), {"_fields_": fields})
        if ctypes.sizeof(made) != entry["size"]:
            raise TypeError(f"{entry['name']}: {ctypes.sizeof(made)} bytes in ctypes, {entry['size']} in C")
        return made


MODEL = build_model()
