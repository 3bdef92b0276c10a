"""Reads an operator's documents from YAML or TOML text and says where, by line or key, they are wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from migrator.config import Config, reason, where
from migrator.errors import ConfigInvalid

Model = TypeVar("Model", bound=BaseModel)
_TOO_DEEP = "lists and mappings are nested too deeply"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema. YAML 1.1 reads 52:54:00:12:34:56 as a number to base 60 and `no` as a truth value."""

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """YAML 1.1 reads 010 as 8."""
        text = node.value
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, re.Pattern[str]] = {}
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _SCALARS[_TAG + _tag] = re.compile(rf"(?:{_pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _tag, _SCALARS[_TAG + _tag], list(_first))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)
_TAGS = frozenset({*_SCALARS, *(_TAG + _tag for _tag in ("str", "seq", "map"))})


def read_documents(text: str, name: str) -> Config:
    """All documents of `text` as one checked Config. `name` is the file's, for messages; ".toml" selects TOML.

    Raises ConfigInvalid: "FILE:LINE: path of the field: what was expected".
    """
    if name.endswith(".toml"):
        return validate(Config, read_toml(text, name), name)
    parts = [validate(Config, body, name, node) for body, node in _read_yaml(text, name)]
    if not parts:
        raise ConfigInvalid(f"{name}: no document", hint="expected networks, address_sets, policies or ports")
    return Config(**{field: [item for part in parts for item in getattr(part, field)] for field in Config.model_fields})


def read_value(text: str, name: str) -> Any:
    """The one document of a YAML text. Raises ConfigInvalid."""
    found = [body for body, _ in _read_yaml(text, name)]
    if len(found) != 1:
        raise ConfigInvalid(f"{name}: expected one document, not {len(found)}")
    return found[0]


def read_toml(text: str, name: str) -> dict[str, Any]:
    """A TOML text as a mapping. Raises ConfigInvalid with the line."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigInvalid(f"{name}: {_TOO_DEEP}") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise ConfigInvalid(f"{name}: {error}") from None


def validate(model: type[Model], body: Any, name: str, node: yaml.Node | None = None) -> Model:
    """`body` as a `model`. `node` gives line numbers. Raises ConfigInvalid that names every wrong field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = [
            f"{name}{_line(node, problem['loc'])}: {where(body, problem['loc'])}: {reason(problem)}"
            for problem in error.errors()
        ]
        raise ConfigInvalid("; ".join(problems)) from None


def _read_yaml(text: str, name: str) -> Iterator[tuple[Any, yaml.Node]]:
    loader = None
    try:
        loader = _Loader(text)  # looks for characters that no document may have
        while loader.check_node():
            node = loader.get_node()
            if node is not None:
                _check_nodes(node, name)
                yield loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigInvalid(f"{name}{line}: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigInvalid(f"{name}: {_TOO_DEEP}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigInvalid(f"{name}: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_nodes(node: yaml.Node, name: str) -> None:
    """Raises ConfigInvalid for what YAML's parser takes in silence, or cannot take."""
    pending, seen_nodes = [node], set()
    while pending:
        node = pending.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        _refuse_tags(node, name)
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        if isinstance(node, yaml.MappingNode):
            _refuse_twins(node, name)
            pending += [part for entry in node.value for part in entry]


def _refuse_tags(node: yaml.Node, name: str) -> None:
    """No tag but the core schema's, and none on what it does not fit: `!!timestamp`, `!!int seven`."""
    scalar = _SCALARS.get(node.tag)
    fits = scalar is None or (isinstance(node, yaml.ScalarNode) and scalar.match(node.value))
    if node.tag not in _TAGS or not fits:
        shown = node.tag.replace(_TAG, "!!")[:40]
        raise ConfigInvalid(f"{name}:{node.start_mark.line + 1}: the tag {shown} does not fit here")


def _refuse_twins(node: yaml.MappingNode, name: str) -> None:
    """YAML's parser takes the last of two equal keys."""
    seen: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise ConfigInvalid(f"{name}:{key.start_mark.line + 1}: key {key.value!r} is given twice")
        seen.add(key.value)


def _line(node: yaml.Node | None, path: Sequence[int | str]) -> str:
    """ ":LINE" of the innermost part of `path` that the document has."""
    if node is None:
        return ""
    mark = node.start_mark
    for step in path:
        key, value = _entry(node, step)
        if value is None:
            break
        node, mark = value, (key or value).start_mark
    return f":{mark.line + 1}"


def _entry(node: yaml.Node, step: int | str) -> tuple[yaml.Node | None, yaml.Node | None]:
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if str(key.value) == str(step)), (None, None))
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return None, node.value[step]
    return None, None
