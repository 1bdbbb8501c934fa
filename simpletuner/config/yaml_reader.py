"""YAML files of other programs: values by their path, each with its line; numbers as YAML 1.2 has them.

PyYAML follows YAML 1.1, where `1e-18` is a text. Nothing but plain values is made of a file, whatever tags it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simpletuner.errors import ConfigError, Problem
from simpletuner.text import NotText, decode, read_file

MAX_BYTES = 10_000_000
_MAX_DEPTH = 20
_MAX_LEVELS = 100  # as in JSON; PyYAML recurses, and Python's limit differs between processes: a compiler raises it


class SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2; it raises ValueError for more than 100 levels of nesting."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: yaml.Node | int | None) -> yaml.Node | None:
        self.levels += 1
        if self.levels > _MAX_LEVELS:
            raise ValueError(f"more than {_MAX_LEVELS} levels of nesting")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


SafeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class YamlDocument:
    """The mappings of a file, flattened.

    Args:
        path: of the file.
        values: `train.learning_rate` -> value; a list is one value.
        lines: of each value and of each mapping around it, from 1.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def problem(self, key: str, message: str, allowed: str | None = None, fix: str | None = None) -> Problem:
        return Problem(message, key, str(self.path), self.lines.get(key), allowed, fix)


def read_yaml(path: Path) -> YamlDocument:
    """The mapping in a file.

    Raises:
        ConfigError: it cannot be read, is not YAML, holds no mapping, or gives a key twice.
    """

    def refused(message: str, line: int | None = None) -> ConfigError:
        return ConfigError(Problem(message, file=str(path), line=line))

    try:
        loader = SafeLoader(decode(read_file(path, MAX_BYTES)))
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise refused("holds no keys with values")
            document = YamlDocument(path, {}, {})
            for key, node, line in _entries(root, loader, ""):
                if key in document.lines:
                    raise refused(f'gives "{key}" twice', line)
                document.lines[key] = line
                if node is not None:
                    document.values[key] = loader.construct_object(node, deep=True)
            return document
        finally:
            loader.dispose()
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or error}") from error
    except NotText as error:
        raise refused(str(error)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise refused(f"is not YAML: {error.problem or error.context}", mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError) as error:
        raise refused(f"is not YAML: {' '.join(str(error).split())[:200]}") from error


def _entries(
    mapping: yaml.MappingNode, loader: SafeLoader, prefix: str, depth: int = 0
) -> Iterator[tuple[str, yaml.Node | None, int]]:
    """Key, value and line of what is in a mapping; the value of a mapping in it is None, and its own entries follow."""
    if depth > _MAX_DEPTH:
        raise ValueError("mappings are nested too deeply")
    for key_node, node in mapping.value:
        key = f"{prefix}{loader.construct_object(key_node)}"
        line = key_node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            yield key, None, line
            yield from _entries(node, loader, f"{key}.", depth + 1)
        else:
            yield key, node, line
