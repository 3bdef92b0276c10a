"""What a fuzz target is: bytes go in, and whatever comes out but what it allows is a finding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FINDINGS = HERE / "findings"


@dataclass(frozen=True)
class Target:
    """`run` raises for a finding and for nothing else: the errors that hostile input deserves stay within it.

    `seeds` are well-formed inputs; `modules` are instrumented for coverage; `words` go into the fuzzer's dictionary.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    modules: tuple[str, ...]
    words: tuple[bytes, ...] = ()
    bytes_max: int = 8192


def stored(name: str) -> dict[str, bytes]:
    """Committed inputs of a target, by name: its corpus, and what was found with it."""
    files = [path for folder in (CORPUS, FINDINGS) for path in sorted((folder / name).glob("*"))]
    return {f"{path.parent.parent.name}/{path.name}": path.read_bytes() for path in files}


def inputs(target: Target) -> dict[str, bytes]:
    """All that a replay takes: seeds made from fixtures and samples, and what is committed."""
    return {**{f"seed-{i}": data for i, data in enumerate(target.seeds())}, **stored(target.name)}


def place_of(error: BaseException) -> tuple[str, ...]:
    """What tells one finding from another: the error's class and the innermost functions that it came through."""
    names: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        names.append(f"{Path(code.co_filename).name}:{code.co_name}")
        trace = trace.tb_next
    return (type(error).__name__, *names[-2:])


def outcome(target: Target, data: bytes) -> tuple[str, ...] | None:
    """Place of the finding that `data` is, None when it is none."""
    try:
        target.run(data)
    except Exception as error:
        return place_of(error)
    return None


def minimised(target: Target, data: bytes, rounds: int = 2000) -> bytes:
    """A shorter input with the same finding: pieces are left out as long as that goes (Zeller's ddmin)."""
    wanted = outcome(target, data)
    size = max(len(data) // 2, 1)
    while wanted is not None and rounds > 0:
        start, shorter = 0, False
        while start < len(data) and rounds > 0:
            rounds -= 1
            without = data[:start] + data[start + size :]
            if outcome(target, without) == wanted:
                data, shorter = without, True
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = max(size // 2, 1)
    return data


def keep(target: Target, data: bytes) -> Path:
    """Write a finding, minimised, where the replay takes it from."""
    small = minimised(target, data)
    path = FINDINGS / target.name / hashlib.sha256(small).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(small)
    return path


def by_name(targets: Iterable[Target]) -> Mapping[str, Target]:
    return {target.name: target for target in targets}
