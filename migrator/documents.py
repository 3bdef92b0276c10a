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


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema. YAML 1.1 reads 52:54:00:12:34:56 as a number to base 60 and `no` as a truth value."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


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


def read_toml(text: str, name: str) -> dict[str, Any]:
    """A TOML text as a mapping. Raises ConfigInvalid with the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
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
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None:
                _refuse_twins(node, name)
                yield loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigInvalid(f"{name}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigInvalid(f"{name}: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _refuse_twins(node: yaml.Node, name: str) -> None:
    """YAML's parser takes the last of two equal keys in silence."""
    pending, seen_nodes = [node], set()
    while pending:
        node = pending.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, _ in node.value if keys.count(key.value) > 1]
        if twice:
            raise ConfigInvalid(f"{name}:{twice[-1].start_mark.line + 1}: key {twice[-1].value!r} is given twice")
        pending += [value for _, value in node.value]


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
