"""The snapshot: one format for tables of state, on disk and between agents. docs/snapshot-format.md specifies it.

    encode_table    table -> sections as bytes, each at most SECTION_BYTES long
    decode_section  bytes -> Section, everything about it checked
    Tally           count and digest of a run of sections (a round of a migration, a whole file)
    Header, snapshot, SnapshotReader   whole files

All input is hostile: whatever is wrong with it raises Corrupt or Incompatible, which say where, in bounded memory.
"""

from migrator.snapshot.format import FORMAT_VERSION, OBJECT_BYTES, SECTION_BYTES
from migrator.snapshot.section import Section, Tally, decode_section, encode_table
from migrator.snapshot.stream import Header, KindInfo, SnapshotReader, Summary, snapshot

__all__ = [
    "FORMAT_VERSION",
    "OBJECT_BYTES",
    "SECTION_BYTES",
    "Header",
    "KindInfo",
    "Section",
    "SnapshotReader",
    "Summary",
    "Tally",
    "decode_section",
    "encode_table",
    "snapshot",
]
